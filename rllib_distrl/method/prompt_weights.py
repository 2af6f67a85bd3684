"""Shapers that weigh whole prompts by how they have fared, and remember that."""

import math
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.group_advantages import group_index, group_mean
from rllib_distrl.maths.pass_k import pass_at_k
from rllib_distrl.maths.statistics import zero_padding
from rllib_distrl.method.batch import SequenceBatch, forget_oldest
from rllib_distrl.method.registry import register, smallest_group
from rllib_distrl.settings import Count, NotNegative, Positive, Share


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
        rates.append(float(pass_at_k(round(size), [round(rate * size)], k)[0]))
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
