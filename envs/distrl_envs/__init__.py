"""Token-level Gymnasium environments with verifiable rewards.

Importing this package registers the environments, so that
`gymnasium.make("distrl_envs:distrl/Countdown-v0")` works anywhere, Ray workers included.
"""

import gymnasium

from distrl_envs.task import Draws, Grade, Problem, Reply, Task, Turn, distinct_rows
from distrl_envs.tasks import TASKS, make_task
from distrl_envs.token_env import OBS_MODES, TokenEnv
from distrl_envs.turns import EnvReply

__all__ = [
    "OBS_MODES",
    "TASKS",
    "Draws",
    "EnvReply",
    "Grade",
    "Problem",
    "Reply",
    "Task",
    "TokenEnv",
    "Turn",
    "distinct_rows",
    "make_task",
]

_ENVIRONMENTS = {
    "distrl/Countdown-v0": "countdown",
    "distrl/Arithmetic-v0": "arithmetic",
    "distrl/GraphPath-v0": "graph_path",
    "distrl/Sums-v0": "sums",
    "distrl/Blackjack-v0": "blackjack",
    "distrl/Mastermind-v0": "mastermind",
    "distrl/CountdownCheck-v0": "countdown_check",
    "distrl/JsonRecord-v0": "json_record",
    "distrl/Math-v0": "math",
    "distrl/Code-v0": "code",
    "distrl/Custom-v0": "custom",
    "distrl/Tools-v0": "tools",
}

for _id, _task in _ENVIRONMENTS.items():
    if _id not in gymnasium.registry:
        gymnasium.register(
            id=_id,
            entry_point="distrl_envs.token_env:TokenEnv",
            kwargs={"task": _task},
            # TokenEnv checks its own input; the wrappers would cost more than the step itself.
            disable_env_checker=True,
            order_enforce=False,
        )
