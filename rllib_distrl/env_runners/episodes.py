"""Building RLlib's episodes from completions, as arrays and without per-token objects."""

from typing import Any

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_distrl.engines.engine import Completion, Request

_NOTHING: dict[str, Any] = {}


def build_episode(
    env: Any,
    request: Request,
    completion: Completion,
    observations: list[Any],
    rewards: list[float],
    first_info: dict[str, Any],
    last_info: dict[str, Any],
    weights_seq_no: int,
    sampling: dict[str, Any],
) -> SingleAgentEpisode:
    """A finished, numpy'ised episode of T steps.

    Args:
        env: the env, for its spaces.
        request: what was asked for; its key names row, sample and visit.
        completion: the T tokens and their behaviour logps.
        observations: T + 1 observations.
        rewards: T rewards.
        first_info: the reset's info, with ``prompt_ids``.
        last_info: the last step's info, with ``finish_reason`` and ``grade``.
        weights_seq_no: version of the weights that sampled.
        sampling: how they sampled: ``temperature``, ``top_p``, ``top_k``, ``greedy``.

    Returns:
        The episode. Its first info holds ``prompt_ids``, ``row``, ``sample``, ``visit`` and
        ``sampling``;
        extra model outputs: ``action_logp``, ``action_dist_inputs`` (logp, and entropy, which is
        NaN where the engine was not asked for it) and the weights' version.
    """
    steps = len(rewards)
    _, row, sample, visit = request.key
    logps = np.asarray(completion.logps, dtype=np.float32)
    entropies = (
        np.full_like(logps, np.nan)
        if completion.entropies is None
        else np.asarray(completion.entropies, dtype=np.float32)
    )
    first = {
        "prompt_ids": first_info["prompt_ids"],
        "row": row,
        "sample": sample,
        "visit": visit,
        "sampling": sampling,
    }
    return SingleAgentEpisode(
        observations=_column(observations),
        observation_space=env.observation_space,
        actions=_column(completion.tokens, np.int64),
        action_space=env.action_space,
        rewards=_column(rewards, np.float32),
        infos=[first, *[_NOTHING] * (steps - 1), last_info],
        terminated=True,
        extra_model_outputs={
            Columns.ACTION_LOGP: logps,
            Columns.ACTION_DIST_INPUTS: np.stack([logps, entropies], axis=-1),
            WEIGHTS_SEQ_NO: np.full(steps, weights_seq_no),
        },
        len_lookback_buffer=0,
    )


def _column(values: Any, dtype: Any = None) -> Any:
    """An array: RLlib takes one as a finished column, though its annotations name lists only."""
    return np.asarray(values, dtype=dtype)
