"""Is the critic right? Prefixes of held-out completions, each continued many times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrl_envs.task import distinct_rows
from rllib_distrl.algorithm.inspection import held_out_runner, sample, score
from rllib_distrl.engine.protocol import Completion, Request
from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.calibration import (
    calibration_metrics,
    explained_variance,
    state_metrics,
)
from rllib_distrl.maths.laws import Law
from rllib_distrl.maths.rank_correlation import ignorance_metrics
from rllib_distrl.rollout.episodes import play

# Keeps the random numbers of continuations apart from those of the completions they continue.
_SEED_OFFSET = 2_000_003


def probe_critic(
    algo: Any, *, prefixes: int = 200, continuations: int = 32, split: str | None = "test"
) -> dict[str, float]:
    """Calibration on held-out completions, and the error of V in states with a known return.

    One completion per problem is sampled with the policy that the critic judges, cut at a random
    place, and continued ``continuations`` times from there. Training is not touched. The cost is
    about ``prefixes * continuations`` half completions.

    Args:
        algo: a built `Algorithm` with a critic, ours or stock, wired by `wire_language_model`.
        prefixes: problems; fewer if the split has fewer.
        continuations: n of each prefix.
        split: of the task; None: the one that is trained on.

    Returns:
        ``prefixes``, ``continuations`` and metrics ``quantile_...`` and ``optimism_...``; only
        the two counts without a critic. Returns are those of the environment.

    Raises:
        RuntimeError: for an error while sampling.
    """
    runner = held_out_runner(algo, split)
    try:
        rows = distinct_rows(runner.token_env.unwrapped.task, prefixes)
        groups = sample(algo, runner, rows, 1)
        scored = score(algo, groups, 1)
        episodes = [group[0] for group in groups]
        seed = algo.config.seed
        cuts = [int(n) for n in np.random.default_rng(seed).integers([len(e) for e in episodes])]
        found: dict[str, float] = {"prefixes": len(rows), "continuations": continuations}
        if "value" not in scored[0]:
            return found
        gamma = algo.config.gamma
        if runner.token_env.unwrapped.has_turns:
            # Continuing in the middle of an episode with replies is not built.
            return {**found, **_on_completions(episodes, scored, gamma)}
        means = _mean_returns(runner, episodes, cuts, continuations, seed, gamma)
    finally:
        runner.stop()
    return {**found, **_on_completions(episodes, scored, gamma), **_in_states(scored, cuts, means)}


def _mean_returns(
    runner: Any,
    episodes: Sequence[Any],
    cuts: Sequence[int],
    n: int,
    seed: int,
    gamma: float,
) -> torch.Tensor:
    """(K,), mean return to go of n continuations of each episode from its cut on."""
    limit = runner.token_env.unwrapped.max_completion_tokens
    requests, heads = [], []
    for episode, cut in zip(episodes, cuts, strict=True):
        first, head = episode.infos[0], episode.actions.data[:cut]
        prompt = [*first["prompt_ids"], *head.tolist()]
        for number in range(n):
            key = (seed + _SEED_OFFSET, first["row"], number, first["visit"])
            requests.append(Request(prompt, key))
            heads.append(head)
    continued = runner.engine.generate(requests, runner.sampling_params(explore=True))
    whole = [_joined(head, tail, limit) for head, tail in zip(heads, continued, strict=True)]
    verdicts = runner.grade(requests, whole)
    returns = []
    for number, (request, completion, verdict) in enumerate(
        zip(requests, whole, verdicts, strict=True)
    ):
        played = play(runner.token_env, request, completion, verdict)
        rewards = np.asarray(played.rewards, dtype=np.float32)[cuts[number // n] :]
        returns.append(float((rewards * gamma ** np.arange(len(rewards))).sum()))
    return torch.tensor(returns).view(-1, n).mean(1)


def _joined(head: np.ndarray, tail: Completion, limit: int) -> Completion:
    """Prefix and continuation as one completion, cut at the length limit."""
    tokens = np.concatenate([head, tail.tokens])
    reason = "length" if len(tokens) > limit else tail.finish_reason
    tokens = tokens[:limit]
    return Completion(tokens, np.zeros(len(tokens), dtype=np.float32), reason)


def _on_completions(
    episodes: Sequence[Any], scored: Sequence[dict[str, Any]], gamma: float
) -> dict[str, float]:
    """Calibration of the critic's law in every state of the completions themselves."""
    rewards = _padded([np.asarray(episode.rewards.data) for episode in episodes])
    mask = _padded([np.ones(len(episode), dtype=bool) for episode in episodes])
    returns = returns_to_go(rewards, mask, gamma)
    if parts := _law_columns(scored):
        law = Law(*(_padded([columns[name] for columns in scored]) for name in parts))
        return calibration_metrics(law, returns, mask)
    values = _padded([columns["value"] for columns in scored])
    return {"quantile_explained_variance": explained_variance(values, returns, mask)}


def _law_columns(scored: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The columns that make the critic's `Law`; none of a scalar critic."""
    fixed = ("law_atoms", "law_probs")
    return next((names for names in (fixed, ("quantiles",)) if {*names} <= scored[0].keys()), ())


def _in_states(
    scored: Sequence[dict[str, Any]], cuts: Sequence[int], means: torch.Tensor
) -> dict[str, float]:
    """How far V is from the mean return, and what knows where."""

    def at_cuts(name: str) -> torch.Tensor:
        rows = [columns[name][cut] for columns, cut in zip(scored, cuts, strict=True)]
        return torch.from_numpy(np.stack(rows))

    values, positions = at_cuts("value"), torch.tensor(cuts)
    found = state_metrics(values, means)
    if parts := _law_columns(scored):
        spread = Law(*map(at_cuts, parts)).std
        found.update(ignorance_metrics(spread, values, means, positions))
    if "bonus_statistic" in scored[0]:
        statistic = at_cuts("bonus_statistic")
        known = ignorance_metrics(statistic, values, means, positions, name="optimism_stat")
        found.update(known)
    return found


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """Rows of unequal length as one tensor, zeros behind."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True)
