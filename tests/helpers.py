"""What several test modules build."""

from rllib_distrl.algorithm.distrl_config import DistRLConfig

COUNTDOWN = "distrl_envs:distrl/Countdown-v0"
TINY = "builtin:countdown-tiny"


def distrl_config(model=TINY, prompts=4, generations=2, **training):
    """A configuration small enough for tests."""
    return (
        DistRLConfig()
        .environment(COUNTDOWN)
        .rl_module(model_config={"model": model})
        .rollout(
            prompts_per_iteration=prompts, num_generations=generations, max_completion_tokens=24
        )
        .training(**{"lr": 1e-3, **training})
        .debugging(seed=1)
    )
