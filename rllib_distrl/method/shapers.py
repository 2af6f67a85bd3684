"""Advantage shapers: (batch, advantages, settings) to (B, T), on the whole batch.

The last two weigh whole prompts by how they have fared, and remember that.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths import credit, optimism, pass_k
from rllib_distrl.maths.group_advantages import (
    check_unit_returns,
    group_index,
    group_mean,
    leave_one_out_posterior,
    logit_shift,
    shifted_edges,
)
from rllib_distrl.maths.quantiles import best_of_k
from rllib_distrl.maths.statistics import masked_mean, row_mean, zero_padding
from rllib_distrl.method.advantages import SOURCES, source_needs, unused_of_group
from rllib_distrl.method.batch import SequenceBatch, forget_oldest, takes_settings_of
from rllib_distrl.method.registry import demand, logp_at, register, resolve, smallest_group
from rllib_distrl.settings import Count, NotNegative, Positive, Share


def _unused_horizon(settings: Mapping[str, Any]) -> set[str]:
    return set() if settings["bonus_schedule"] == "linear" else {"bonus_horizon"}


def _dltv_needs(settings: Mapping[str, Any]) -> frozenset[str]:
    return resolve("bonus_statistic", settings["bonus_stat"]).needs


@register("shaper", "dltv", needs=_dltv_needs, ignores=_unused_horizon)
@takes_settings_of(optimism.optimistic_advantages, without=("k",))
def dltv(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    bonus_stat: str | dict[str, Any] = "ltv_sqrt",
    **settings: Any,
) -> Tensor:
    """The optimistic advantage A + c_k B; writes the metrics `optimism_…`.

    B is made of a `bonus_statistic`; the other settings are those of
    `maths.optimism.optimistic_advantages`.
    """
    shaped, metrics = optimism.optimistic_advantages(
        advantages,
        resolve("bonus_statistic", bonus_stat).of_whole(batch),
        batch.loss_mask,
        k=batch.k,
        all_reduce=batch.all_reduce,
        width=batch.width,
        **settings,
    )
    batch.metrics.update(metrics)
    return shaped


@register("shaper", "entropy_shaped", needs=("entropy",))
def entropy_shaped(
    batch: SequenceBatch, advantages: Tensor, *, alpha: float = 0.4, kappa: float = 2.0
) -> Tensor:
    """A + min(α H, |A|/κ), H the token's entropy (arXiv 2506.14758).

    Args:
        batch: With `entropy`.
        advantages: (B, T), A.
        alpha: α; 0.4 is usual for group advantages, 0.1 for GAE.
        kappa: κ > 1, so that no sign changes.

    Returns:
        (B, T).

    Raises:
        ValueError: For κ of at most 1.
    """
    if kappa <= 1.0:
        raise ValueError(f"entropy_shaped needs kappa > 1 (2.0 is usual), got {kappa}")
    entropy = batch.column("entropy").detach()
    shaped = advantages + (alpha * entropy).minimum(advantages.abs() / kappa)
    return zero_padding(shaped, batch.loss_mask)


@register("shaper", "length_power", needs=("groups",))
def length_power(batch: SequenceBatch, advantages: Tensor, *, alpha: float = 1.0) -> Tensor:
    """A_i L_i^{−α} / mean_j L_j^{−α}, the mean over the group; for the `constant` aggregation.

    ΔL normalisation; α = 0 changes nothing (Dr. GRPO).

    Args:
        batch: Any.
        advantages: (B, T), A.
        alpha: α ≥ 0; 1 or 0.75 are usual.

    Returns:
        (B, T).
    """
    power = batch.lengths.clamp(min=1).to(advantages.dtype) ** -alpha
    weight = power / group_mean(power, batch.group)
    return zero_padding(advantages * weight.unsqueeze(1), batch.loss_mask)


@register("shaper", "perplexity_position")
@takes_settings_of(credit.perplexity_and_position)
def perplexity_position(batch: SequenceBatch, advantages: Tensor, **settings: Any) -> Tensor:
    """`maths.credit.perplexity_and_position`: less for odd completions, more for late tokens."""
    return credit.perplexity_and_position(
        advantages, batch.action_logp, batch.loss_mask, all_reduce=batch.all_reduce, **settings
    )


@register("shaper", "mpt_mask", needs=("entropy",))
def mpt_mask(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    probability: float = 0.99,
    entropy_below: float = 0.2,
) -> Tensor:
    """Takes the advantage from mastered tokens: well known ones of right completions.

    Where R > 1/2, π(o_t) ≥ p and the completion's mean entropy is below a target; such tokens
    would only sharpen the policy (UloRL, arXiv 2507.19766). They still count as tokens in the
    loss's mean (our choice).
    """
    entropy = row_mean(batch.column("entropy"), batch.loss_mask)
    sure = (batch.returns > 0.5) & (entropy < entropy_below)
    mastered = sure.unsqueeze(1) & (batch.action_logp.exp() >= probability)
    return torch.where(mastered, 0.0, zero_padding(advantages, batch.loss_mask))


@register("shaper", "truncation_mask")
def truncation_mask(batch: SequenceBatch, advantages: Tensor) -> Tensor:
    """Takes the advantage from completions that reach the length limit.

    That they did not end says little about what they say (AceReason-Nemotron, arXiv 2505.16400,
    under short limits; DAPO's overlong filtering). An end at the very last token counts as none,
    and the tokens still count in the loss's mean (our choices).
    """
    assert batch.width is not None
    ended = (batch.lengths < batch.width).unsqueeze(1)
    return torch.where(ended, zero_padding(advantages, batch.loss_mask), 0.0)


@register("shaper", "advantage_filter")
def advantage_filter(
    batch: SequenceBatch, advantages: Tensor, *, least: NotNegative = 0.05
) -> Tensor:
    """Takes the advantage from completions of small |A|, and from good ones at the length limit.

    A is the completion's mean over tokens; those with |A| ≤ `least` teach little, and an answer
    that came with the last token allowed is not to be learned. The filter of EFRame (arXiv
    2506.22200); its exploration and replay are the allocator `explore_filter_replay`. The tokens
    still count in the loss's mean (our choice).
    """
    assert batch.width is not None
    valid = zero_padding(advantages, batch.loss_mask)
    mean = row_mean(valid, batch.loss_mask)
    cut = (batch.lengths >= batch.width) & (mean > 0)
    return torch.where(((mean.abs() > least) & ~cut).unsqueeze(1), valid, 0.0)


def _check_downsample(*, completions: float, tokens: float, horizon: int | None) -> None:
    if not 0.0 < completions <= 1.0 or not 0.0 < tokens <= 1.0:
        raise ValueError(
            "shaper 'downsample' takes shares in (0, 1]; got completions = "
            f"{completions}, tokens = {tokens}"
        )
    if horizon is not None and horizon < 1:
        raise ValueError(f"shaper 'downsample' takes horizon >= 1 or none; got {horizon}")


@register("shaper", "downsample", needs=("groups", "entropy"), check=_check_downsample)
def downsample(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    completions: float = 0.5,
    tokens: float = 0.2,
    horizon: int | None = None,
) -> Tensor:
    """D³S: only the completions whose advantages vary most, and of these the tokens of large |A| H.

    Both shares grow linearly to 1 over `horizon` iterations; none: they stay. arXiv 2509.22115,
    after notes on it; the shares are our choice. The other tokens have advantage 0 and still count
    in the loss's mean, the shares of tokens are of this learner's (our choices).
    """
    done = 0.0 if horizon is None else min(1.0, (batch.k - 1) / horizon)
    of_rows, of_tokens = (share + (1.0 - share) * done for share in (completions, tokens))
    valid = zero_padding(advantages, batch.loss_mask)
    per_row = row_mean(valid, batch.loss_mask)
    kept = credit.most_varied(per_row, batch.group, of_rows).unsqueeze(1) & batch.loss_mask
    score = valid.abs() * zero_padding(batch.column("entropy"), batch.loss_mask)
    return torch.where(credit.largest_share(score, kept, of_tokens), valid, 0.0)


@register("shaper", "confidence_reweight", needs=("groups", "prompt_logp"))
def confidence_reweight(
    batch: SequenceBatch, advantages: Tensor, *, alpha: float = 0.3, share: float = 0.2
) -> Tensor:
    """A_i + α (c(prompt) − c(completion)), c the confidence in the least likely tokens.

    Off for groups without a completion that passed. ProGRPO's ARM (arXiv 2602.05281), after notes
    on it; α is our choice. A prompt's tokens of probability 1 are taken for padding.
    """
    prompt = batch.column("prompt_logp")
    of_prompt = credit.lowest_confidence(prompt, prompt != 0, share)
    of_completion = credit.lowest_confidence(batch.action_logp, batch.loss_mask, share)
    passed = group_mean((batch.returns > 0.5).to(advantages.dtype), batch.group) > 0
    added = torch.where(passed, alpha * (of_prompt - of_completion), 0.0)
    return zero_padding(advantages + added.unsqueeze(1), batch.loss_mask)


def _tempered(settings: Mapping[str, Any]) -> set[str]:
    return {logp_at(factor) for factor in (1.0, settings["hot"], settings["cold"])}


@register("shaper", "virtual_temp", needs=_tempered)
def virtual_temp(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    target: NotNegative = 0.5,
    hot: Positive = 1.2,
    cold: Positive = 0.8,
    bound: NotNegative = 0.1,
    good_above: float = 0.05,
) -> Tensor:
    """(1 − α) A + α b π_T/π: right tokens pull towards the policy at another temperature.

    b is 1 for returns above a limit, T `hot` where the entropy is at most the target and else
    `cold`, both as factors of the sampling temperature; α = a/(1 + a), a = min(|H* − Ĥ|, bound) /
    mean(b). Nothing changes at the target, and where no return is good. DCPO (arXiv 2601.12730,
    its numbers); Ĥ is −mean ln π of the present batch instead of the last step's (our choice: it
    then needs no state).

    Args:
        batch: With logps at the three temperatures.
        advantages: (B, T), A.
        target: H*, in nats.
        hot: T that spreads.
        cold: T that sharpens.
        bound: Largest distance that counts, in nats.
        good_above: Returns above are good.

    Returns:
        (B, T).
    """
    mask, logp = batch.loss_mask, batch.column(logp_at(1.0))
    entropy = -masked_mean(batch.action_logp, mask, batch.all_reduce)
    good = (batch.returns > good_above).to(advantages.dtype)
    share = masked_mean(good, torch.ones_like(good, dtype=torch.bool), batch.all_reduce)
    distance = (target - entropy).abs().clamp(max=bound)
    alpha = torch.where(share > 0, distance / (share + distance), 0.0)
    tempered = batch.column(logp_at(hot if float(entropy) <= target else cold))
    ratio = zero_padding(tempered - logp, mask).exp()
    return zero_padding((1.0 - alpha) * advantages + alpha * good.unsqueeze(1) * ratio, mask)


def _prior(batch: SequenceBatch, source: str) -> Tensor:
    """(B,), V(s_0) by the critic, or the mean return of all learners' rows without one."""
    if source == "returns":
        rows = torch.ones_like(batch.returns, dtype=torch.bool)
        return masked_mean(batch.returns, rows, batch.all_reduce).expand(len(batch))
    value = batch.law[:, 0].mean if source == "quantiles" else batch.column(source)[:, 0]
    return value.clamp(0.0, 1.0)


def _check_pass_at_k(*, k: int, source: str, prior_weight: float, **_: Any) -> None:
    if k < 1 or source not in SOURCES:
        raise ValueError(
            f"shaper 'pass_at_k' takes k >= 1 and source in {SOURCES}; got {k}, {source!r}"
        )
    if not prior_weight >= 0:
        raise ValueError(f"shaper 'pass_at_k' takes prior_weight >= 0; got {prior_weight}")


def _pass_at_k_fits(config: Any, *, source: str, calibrate: bool, **_: Any) -> None:
    if calibrate or source == "returns":  # undiscounted ones of whole completions
        demand(config, "shaper 'pass_at_k' on returns", gamma=1.0)


@register(
    "shaper", "pass_at_k", needs=source_needs, check=_check_pass_at_k, fits=_pass_at_k_fits,
    ignores=unused_of_group,
)  # fmt: skip
def pass_at_k(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    k: int = 4,
    source: str = "quantiles",
    calibrate: bool = True,
    prior_weight: float = 2.0,
) -> Tensor:
    """A · (1 − ρ_{k−1}(s_0)), before whitening; ρ is the expected best of k − 1 at the prompt.

    For binary returns and R − V as advantage it follows the gradient of pass@k, up to a factor.
    Ours; returns in [0, 1]. k = 1 is off, 2 mild, 4 for diversity.

    Args:
        batch: Any, with the source's column.
        advantages: (B, T), A.
        k: ≥ 1.
        source: What is known of the prompt: the critic's "quantiles", its "values", or only the
            "returns" of the batch (no critic: the control).
        calibrate: Whether the group's other returns correct it, leave-one-out.
        prior_weight: n₀, completions that the source counts for.

    Returns:
        (B, T).

    Raises:
        ValueError: For returns outside [0, 1], where they are read.
    """
    if calibrate or source == "returns":
        check_unit_returns(batch.returns, "shaper 'pass_at_k'")
    value = prior = _prior(batch, source)
    if calibrate:
        value = leave_one_out_posterior(prior, batch.returns, batch.group, prior_weight)
    if source == "quantiles":
        law = batch.law[:, 0]
        shift = logit_shift(value, prior) if calibrate else torch.zeros_like(prior)
        best = best_of_k(law.atoms, k - 1, shifted_edges(law.edges, shift))
    else:
        best = 1.0 - (1.0 - value.clamp(0.0, 1.0)) ** (k - 1)
    weight = (1.0 - best).clamp(min=0.0)
    batch.metrics["pass_at_k_weight_mean"] = float(weight.mean())
    return advantages * weight.unsqueeze(1)


@register("shaper", "curve_weight", needs=("groups",))
def curve_weight(batch: SequenceBatch, advantages: Tensor, *, window: Count = 10) -> Tensor:
    """A · f(p)/F(p), f and F density and distribution of recent pass rates: most for hard prompts.

    The histogram has G + 1 bins and holds the last `window` batches, of prompts that were neither
    solved nor failed by the whole group; such prompts get weight 0. CurveRL (arXiv 2605.24331), as
    its authors' code computes it, but that the window ends with the present batch and not before
    it: no prompt then has a density of 0 (our choice). Returns above 1/2 count as passed.

    Args:
        batch: Any.
        advantages: (B, T), A; R − group mean in the paper.
        window: t₀, batches.

    Returns:
        (B, T).
    """
    rates = group_mean((batch.returns > 0.5).to(advantages.dtype), batch.group)
    bins = int(group_index(batch.group)[1].max()) + 1
    batches: list[list[float]] = batch.memory.setdefault("curve_weight", [])
    of_groups = rates[_a_row_of_each(batch.group)]
    batches.append([p for p in batch.all_gather(of_groups).tolist() if 0.0 < p < 1.0])
    del batches[:-window]
    held = torch.tensor([p for rates in batches for p in rates], dtype=torch.float64)
    counts = torch.bincount(_bin(held, bins), minlength=bins).double()
    weights = (counts / counts.cumsum(0).clamp(min=1.0)).to(advantages)
    weight = torch.where((rates > 0) & (rates < 1), weights[_bin(rates, bins)], 0.0)
    return zero_padding(advantages * weight.unsqueeze(1), batch.loss_mask)


def _a_row_of_each(group: Tensor) -> Tensor:
    """A row of each group, in the order of `group_index`."""
    index, sizes = group_index(group)
    return index.argsort(stable=True)[sizes.cumsum(0) - 1]


def _bin(rates: Tensor, bins: int) -> Tensor:
    return (rates * bins).floor().long().clamp(0, bins - 1)


EDGES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
"""Between Prompt-GDRO's bins of prompts."""


def _pressure_fits(config: Any, *, k: int, **settings: Any) -> None:
    group = smallest_group(config)
    if k > group:
        raise ValueError(
            f"shaper 'bin_pressure' has k = {k}, but a group has {group} completions at the least. "
            "Choose 1 <= k <= num_generations, or n_min of the allocator."
        )


@register("shaper", "bin_pressure", needs=("groups",), fits=_pressure_fits)
def bin_pressure(
    batch: SequenceBatch,
    advantages: Tensor,
    *,
    k: Count = 1,
    strength: NotNegative = 0.65,
    decay: Share = 0.88,
    cap: Positive = 15.0,
    history: Count = 100,
    hysteresis: NotNegative = 0.03,
) -> Tensor:
    """A · min(e^{η S_b}, cap): prompts are weighed by the pressure of their bin of difficulty.

    A prompt's bin is that of its mean pass@k over its last visits, and changes only where the mean
    is beyond the `EDGES` by the hysteresis. S_b ← decay S_b + (1 − decay) loss_b after each batch,
    which the next ones feel; bins without a prompt keep theirs. Prompt-GDRO (arXiv 2601.19280),
    its numbers; that a prompt's loss is its share of failures is our choice, and so is k.
    Returns above 1/2 count as passed. Remembers the last 100,000 prompts.

    Args:
        batch: With `prompt`.
        advantages: (B, T), A.
        k: Completions of which one has to pass, at most a group.
        strength: η; 0 changes nothing.
        decay: Of the pressure.
        cap: Largest weight.
        history: Visits of a prompt that count.
        hysteresis: In units of the pass rate.

    Returns:
        (B, T).
    """
    memory = batch.memory.setdefault("bin_pressure", {"pressure": [0.0] * 7, "prompts": {}})
    prompts, pressure = memory["prompts"], memory["pressure"]
    sizes, of_group = group_index(batch.group)[1], _a_row_of_each(batch.group)
    passed = group_mean((batch.returns > 0.5).double(), batch.group)[of_group]
    visits = torch.stack([batch.column("prompt")[of_group].double(), passed, sizes.double()], dim=1)
    losses: dict[int, list[float]] = {}
    for prompt, rate, size in batch.all_gather(visits).tolist():
        known = prompts.setdefault(int(prompt), {"rates": [], "bin": None})
        rates = known["rates"]
        rates.append(float(pass_k.pass_at_k(round(size), [round(rate * size)], k)[0]))
        del rates[:-history]
        known["bin"] = bin_of(sum(rates) / len(rates), known["bin"], hysteresis)
        losses.setdefault(known["bin"], []).append(1.0 - rate)
    weight = [
        min(math.exp(strength * pressure[prompts[int(prompt)]["bin"]]), cap)
        for prompt in batch.column("prompt").tolist()
    ]
    for number, some in losses.items():
        pressure[number] = decay * pressure[number] + (1.0 - decay) * sum(some) / len(some)
    forget_oldest(prompts)
    weights = torch.tensor(weight, dtype=advantages.dtype, device=advantages.device)
    return zero_padding(advantages * weights.unsqueeze(1), batch.loss_mask)


def bin_of(rate: float, present: int | None, hysteresis: float) -> int:
    """The bin of a rate, or the present one where the rate is not clearly outside of it."""
    if present is not None:
        low = EDGES[present - 1] if present else -math.inf
        high = EDGES[present] if present < len(EDGES) else math.inf
        if low - hysteresis <= rate < high + hysteresis:
            return present
    return sum(edge <= rate for edge in EDGES)
