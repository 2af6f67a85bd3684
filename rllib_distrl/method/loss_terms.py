"""Around a policy loss: regularisers, aggregations, importance corrections, and controllers."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.kl import check_kl, kl_estimate
from rllib_distrl.maths.losses import AGGREGATIONS, budget_weights, token_weights
from rllib_distrl.maths.statistics import importance_weights, masked_mean
from rllib_distrl.maths.weighted_losses import differentiable_kl
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.formula import of_batch
from rllib_distrl.method.registry import Stage, register
from rllib_distrl.settings import Count, NotNegative, Positive, Share


def _check_kl(*, coeff: float, estimator: str) -> None:
    check_kl(coeff, estimator)
    if estimator == "k1":
        raise ValueError(
            "regulariser 'kl' has estimator 'k1', whose gradient as a loss is zero on average: "
            "nothing would be held back. Use 'k2', or reward transform 'kl_penalty' with 'k1'."
        )


@register("regulariser", "kl", needs=("ref_logp",), check=_check_kl)
def kl(logp: Tensor, batch: SequenceBatch, *, coeff: float = 1e-3, estimator: str = "k2") -> Tensor:
    """Coefficient times the estimated KL to the reference policy.

    With "k2" the gradient is that of KL(π ‖ π_ref), with "k3" that of KL(π_ref ‖ π).

    Args:
        logp: (B, T).
        batch: With `ref_logp`.
        coeff: β ≥ 0.
        estimator: "k2" or "k3"; see `maths.kl`.

    Returns:
        (B, T).
    """
    return coeff * kl_estimate(logp, batch.column("ref_logp"), estimator, batch.loss_mask)


register("regulariser", "rpg_kl")(of_batch(differentiable_kl, given=("logp",)))


def _aggregation(name: str) -> None:
    @register("aggregation", name)
    def weights(batch: SequenceBatch) -> Tensor:
        """`maths.losses.token_weights`; the divisor is the length limit."""
        return token_weights(
            batch.loss_mask, name, divisor=batch.width, all_reduce=batch.all_reduce
        )

    weights.__qualname__ = name


for _name in AGGREGATIONS:
    _aggregation(_name)


@register("aggregation", "token_budget")
def token_budget(batch: SequenceBatch, *, tokens: Count) -> Tensor:
    """`maths.losses.budget_weights`: a fixed budget of tokens per update, and a divisor of it."""
    return budget_weights(batch.loss_mask, tokens, all_reduce=batch.all_reduce)


@register("importance_correction", "none")
def uncorrected(logp: Tensor, batch: SequenceBatch) -> Tensor:
    """Weights of 1: what samples is taken for what learns."""
    del logp
    return torch.ones_like(batch.action_logp)


@register("importance_correction", "truncated")
def truncated(logp: Tensor, batch: SequenceBatch, *, importance_bound: float = 2.0) -> Tensor:
    """min(w, C), w learner over sampler at each token; see `maths.statistics`."""
    return importance_weights(
        logp, batch.action_logp, batch.loss_mask, cap=importance_bound, mode="truncate"
    )


@register("importance_correction", "masked")
def masked(logp: Tensor, batch: SequenceBatch, *, importance_bound: float = 2.0) -> Tensor:
    """The weight w where 1/C <= w <= C, else 0: tokens with a wild ratio teach nothing."""
    return importance_weights(
        logp, batch.action_logp, batch.loss_mask, cap=importance_bound, mode="mask"
    )


@register("controller", "adaptive_entropy", needs=("entropy",))
class AdaptiveEntropy:
    """Keeps the entropy near a target by the entropy bonus's coefficient (Skywork-OR1).

    Before each update c moves by ± `step`, up where H < `target`; the bonus acts only there.

    Attributes:
        setting: What it moves.
    """

    setting = "entropy_coeff"

    def __init__(
        self, *, target: float = 0.2, step: float = 1e-4, maximum: float = 5e-3, start: float = 0.0
    ):
        if not 0.0 <= start <= maximum or step <= 0.0:
            raise ValueError(
                f"adaptive_entropy needs 0 <= start <= maximum and step > 0, got start={start}, "
                f"maximum={maximum}, step={step}"
            )
        self._target, self._step, self._maximum = target, step, maximum
        self._coeff = start

    def update(self, entropy: float) -> float:
        """Takes the entropy before an update and gives the coefficient to use in it.

        Args:
            entropy: Mean token entropy of the iteration's batch, in nats.

        Returns:
            `entropy_coeff` ≥ 0.
        """
        below = entropy < self._target
        moved = self._coeff + (self._step if below else -self._step)
        self._coeff = min(max(moved, 0.0), self._maximum)
        return self._coeff if below else 0.0

    def get_state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"coeff": self._coeff}

    def set_state(self, state: dict[str, float]) -> None:
        """Restores `get_state()`'s result."""
        self._coeff = state["coeff"]


@register("controller", "adaptive_clip", needs=("entropy",))
class AdaptiveClip:
    """ε = clip(ε₀ (1 + a tanh H − b plateau), low, high): wide where unsure, narrow once it rests.

    H is the batch's mean entropy in nats; plateau is 1 where the mean return of the last `window`
    iterations is not above that of as many before by `gain`, else 0. After PPO-BR (arXiv
    2505.17714); what H is measured in, the plateau and its numbers are our choice.

    Attributes:
        setting: What it moves.
    """

    setting = "clip_param"

    def __init__(
        self,
        *,
        start: Positive = 0.2,
        widen: NotNegative = 0.5,
        narrow: Share = 0.3,
        low: Positive = 0.1,
        high: Positive = 0.4,
        window: Count = 5,
        gain: float = 0.0,
    ):
        if not low <= start <= high:
            raise ValueError(
                f"adaptive_clip needs low <= start <= high, got low={low}, start={start}, "
                f"high={high}"
            )
        self._start, self._widen, self._narrow = start, widen, narrow
        self._low, self._high, self._window, self._gain = low, high, window, gain
        self._returns: list[float] = []

    def update(self, entropy: float, mean_return: float) -> float:
        """Takes what precedes an update and gives the half width to use in it.

        Args:
            entropy: Mean token entropy of the iteration's batch, in nats.
            mean_return: Of its completions, after the reward transforms.

        Returns:
            `clip_param`.
        """
        self._returns = [*self._returns, mean_return][-2 * self._window :]
        before, last = self._returns[: self._window], self._returns[self._window :]
        full = len(last) == self._window
        plateau = full and sum(last) - sum(before) <= self._gain * self._window
        width = self._start * (1.0 + self._widen * math.tanh(entropy) - self._narrow * plateau)
        return min(max(width, self._low), self._high)

    def get_state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold."""
        return {"returns": list(self._returns)}

    def set_state(self, state: dict[str, list[float]]) -> None:
        """Restores `get_state()`'s result."""
        self._returns = list(state["returns"])


class Controllers:
    """The controllers of a method at work; each moves one setting of `[training]`."""

    def __init__(self, stages: Sequence[Stage]):
        """Starts them.

        Raises:
            ValueError: for a setting out of bounds.
        """
        self._stages = stages
        self._controllers = {stage.name: stage() for stage in stages}

    def update(self, batch: SequenceBatch) -> dict[str, float]:
        """Shows them an iteration's batch, over all learners.

        Args:
            batch: with ``entropy``, where there is a controller.

        Returns:
            Setting to the value that holds in this iteration.
        """
        if not self._controllers:
            return {}
        for stage in self._stages:
            stage.prepare(batch)
        entropy = float(masked_mean(batch.column("entropy"), batch.loss_mask, batch.all_reduce))
        rows = torch.ones_like(batch.returns, dtype=torch.bool)
        told = entropy, float(masked_mean(batch.returns, rows, batch.all_reduce))
        return {
            each.setting: each.update(*told[: len(inspect.signature(each.update).parameters)])
            for each in self._controllers.values()
        }

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold, by name."""
        return {name: each.get_state() for name, each in self._controllers.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; a controller that is not in it starts afresh."""
        for name, each in self._controllers.items():
            if name in state:
                each.set_state(state[name])
