"""An environment of SkyRL-Gym that the tests name by this module."""

import random

import skyrl_gym
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.tools import SearchToolGroup


class Higher(BaseTextEnv):
    """Says where a number lies, beside a roll of the global generator."""

    def __init__(self, env_config, extras):
        super().__init__()
        self.secret, self.cost = int(extras["reward_spec"]["ground_truth"]), env_config.cost
        self.max_turns = extras.get("max_turns", 3)
        self.fault = env_config.get("fault", "")
        if self.fault == "service":
            self.init_tool_groups([SearchToolGroup()])

    def init(self, prompt):
        return ([{"role": "user", "content": "Hello!"}] if self.fault == "init" else prompt), {}

    def step(self, action):
        self.turns += 1
        roll = random.SystemRandom() if self.fault == "chance" else random
        told = "higher" if int(action) < self.secret else "lower"
        said = {"role": "user", "content": f"{told} {roll.randrange(10**9)}"}
        right = int(action) == self.secret
        output = {
            "observations": [said, {"role": "user", "content": f"{self.max_turns - self.turns}"}],
            "reward": right - self.cost,
            "done": right or self.turns >= self.max_turns,
            "metadata": {},
        }
        return output | ({"postprocessed_action": "1"} if self.fault == "rewrites" else {})


if "tests/Higher" not in skyrl_gym.registry:
    skyrl_gym.register("tests/Higher", Higher)
