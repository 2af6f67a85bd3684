"""Replaying completions through an env, and building RLlib's episodes from what it says."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from distrl_envs.token_env import Verdict
from rllib_distrl.engine.protocol import Completion, Request
from rllib_distrl.model.sequences import CRITIC_OBSERVATIONS

# Gets the name of an RLlib callback and the episode.
Hook = Callable[[str, SingleAgentEpisode], None]

_NOTHING: dict[str, Any] = {}


class Played(NamedTuple):
    """What an env made of a completion, whose rewards and end it alone decides.

    Attributes:
        observations: T + 1, for the T tokens that were played.
        rewards: T.
        infos: T + 1, the reset's first.
        terminated: whether the task has ended.
        truncated: whether a wrapper has cut the completion, before or at its end.
    """

    observations: list[Any]
    rewards: list[float]
    infos: list[dict[str, Any]]
    terminated: bool
    truncated: bool


def play(env: Any, request: Request, completion: Completion, verdict: Verdict | None) -> Played:
    """Plays a completion, as far as the env lets it.

    Args:
        env: `TokenEnv`, perhaps in wrappers.
        request: what was asked for; its key names row, sample and visit.
        completion: what was generated.
        verdict: how the env has graded it beforehand; None: it grades now.

    Raises:
        RuntimeError: the env has not ended the episode where the engine did.
    """
    observation, info = env.reset(options=_options(request, completion, verdict))
    observations, rewards, infos = [observation], [], [info]
    terminated = truncated = False
    step = env.step
    for token in np.asarray(completion.tokens).tolist():
        observation, reward, terminated, truncated, info = step(token)
        observations.append(observation)
        rewards.append(reward)
        infos.append(info or _NOTHING)
        if terminated or truncated:
            break
    _check_end(request, completion, len(rewards), terminated, truncated)
    return Played(observations, rewards, infos, terminated, truncated)


def build_episode(
    env: Any,
    request: Request,
    completion: Completion,
    played: Played,
    sampling: dict[str, Any],
) -> SingleAgentEpisode:
    """A finished, numpy'ised episode, as arrays and without per-token objects.

    Args:
        env: the env, for its spaces.
        request: what was asked for.
        completion: the tokens, their behaviour logps and weights' versions, of which the first T
            were played.
        played: what the env made of them.
        sampling: how they sampled: `SamplingParams.distribution`.

    Returns:
        The episode. Its first info holds ``prompt_ids``, ``row``, ``sample``, ``visit``,
        ``sampling``, what wrappers add, and with replies ``replies``: pairs of how many tokens were
        sampled before one and its tokens; extra model outputs: ``action_logp``,
        ``action_dist_inputs`` (logp, and entropy, which is NaN where the engine was not asked for
        it) and the version of the weights that sampled each token; ``critic_observations`` (T, n)
        where a critic is told numbers.
    """
    steps = len(played.rewards)
    outputs = _outputs(env, request, completion)
    if _tells_stock(env):
        outputs[CRITIC_OBSERVATIONS] = returns_so_far(played.rewards)
    return SingleAgentEpisode(
        observations=_column(played.observations),
        observation_space=env.observation_space,
        actions=_column(completion.tokens[:steps], np.int64),
        action_space=env.action_space,
        rewards=_column(played.rewards, np.float32),
        infos=[_first_info(request, completion, played.infos[0], sampling), *played.infos[1:]],
        terminated=played.terminated,
        truncated=played.truncated,
        extra_model_outputs={name: column[:steps] for name, column in outputs.items()},
        len_lookback_buffer=0,
    )


def returns_so_far(rewards: Sequence[float]) -> np.ndarray:
    """The stock of each state, c_t = Σ_{s<t} r_s: what an episode has earned before a token.

    A critic that is told it may know the law of the whole return, c_t + Z (Pires et al. 2025, arXiv
    2501.13028, where the stock is part of the state; γ = 1 here, so that it is not divided by γ).

    Args:
        rewards: T.

    Returns:
        (T, 1) float32, 0 first.
    """
    before = np.cumsum([0.0, *rewards[:-1]])
    return before[: len(rewards)].astype(np.float32)[:, None]


def _tells_stock(env: Any) -> bool:
    return env.unwrapped.critic_observation == "stock"


def play_watched(
    env: Any,
    request: Request,
    completion: Completion,
    verdict: Verdict,
    sampling: dict[str, Any],
    hook: Hook,
) -> SingleAgentEpisode:
    """`play` and `build_episode` step by step, for callbacks that look at an episode under way.

    Args:
        env: see `play`, also for what it raises.
        request: see `play`.
        completion: see `play`.
        verdict: see `play`.
        sampling: see `build_episode`.
        hook: called with ``on_episode_created`` before the reset, ``on_episode_start`` after it
            and ``on_episode_step`` after each step, and the episode as it is then.
    """
    outputs = _outputs(env, request, completion)
    episode = SingleAgentEpisode(
        observation_space=env.observation_space,
        action_space=env.action_space,
        len_lookback_buffer=0,
    )
    hook("on_episode_created", episode)
    observation, info = env.reset(options=_options(request, completion, verdict))
    episode.add_env_reset(
        observation=observation, infos=_first_info(request, completion, info, sampling)
    )
    hook("on_episode_start", episode)
    earned = 0.0
    for step, token in enumerate(np.asarray(completion.tokens, dtype=np.int64)):
        observation, reward, terminated, truncated, info = env.step(int(token))
        told = {name: column[step] for name, column in outputs.items()}
        if _tells_stock(env):
            told[CRITIC_OBSERVATIONS] = np.array([earned], dtype=np.float32)
        earned += reward
        episode.add_env_step(
            observation=observation,
            action=token,
            reward=np.float32(reward),
            infos=info,
            terminated=terminated,
            truncated=truncated,
            extra_model_outputs=told,
        )
        hook("on_episode_step", episode)
        if episode.is_done:
            break
    ended = episode.is_terminated, episode.is_truncated
    _check_end(request, completion, len(episode), *ended)
    return episode.to_numpy()


def _options(request: Request, completion: Completion, verdict: Verdict | None) -> dict[str, Any]:
    options = {"row": request.key[1], "verdict": verdict}
    if completion.replies:
        options |= {"replies": completion.replies, "address": request.key}
    return options


def _first_info(
    request: Request, completion: Completion, info: dict[str, Any], sampling: dict[str, Any]
) -> dict[str, Any]:
    _, row, sample, visit = request.key
    kept = {name: value for name, value in info.items() if name != "problem"}
    shown = tuple((reply.at, reply.ids) for reply in completion.replies if reply.ids)
    if shown:
        kept["replies"] = shown
    return {**kept, "row": row, "sample": sample, "visit": visit, "sampling": sampling}


def _outputs(env: Any, request: Request, completion: Completion) -> dict[str, np.ndarray]:
    logps = np.asarray(completion.logps, dtype=np.float32)
    entropies = (
        np.full_like(logps, np.nan)
        if completion.entropies is None
        else np.asarray(completion.entropies, dtype=np.float32)
    )
    outputs = {
        Columns.ACTION_LOGP: logps,
        Columns.ACTION_DIST_INPUTS: np.stack([logps, entropies], axis=-1),
        WEIGHTS_SEQ_NO: np.asarray(completion.versions, dtype=np.int64),
    }
    token_env = env.unwrapped
    if token_env.critic_observation == "state":
        tokens = np.asarray(completion.tokens).tolist()
        outputs[CRITIC_OBSERVATIONS] = token_env.critic_observations(
            request.key[1], tokens, completion.replies
        )
    return outputs


def _check_end(
    request: Request, completion: Completion, steps: int, terminated: bool, truncated: bool
) -> None:
    if truncated or (terminated and steps == len(completion.tokens)):
        return
    raise RuntimeError(
        f"Engine and env disagree about the end of row {request.key[1]}: "
        f"{len(completion.tokens)} tokens generated, {steps} played. An episode ends at an EOS "
        "token, at [rollout] max_completion_tokens, or where a wrapper says truncated."
    )


def _column(values: Any, dtype: Any = None) -> Any:
    """An array: RLlib takes one as a finished column, though its annotations name lists only."""
    return np.asarray(values, dtype=dtype)
