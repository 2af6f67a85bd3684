"""Around a policy loss: regularisers, aggregations, importance corrections, and controllers."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.maths.losses import (
    AGGREGATIONS,
    budget_weights,
    check_kl,
    kl_estimate,
    token_weights,
)
from rllib_distrl.maths.statistics import importance_weights, masked_mean
from rllib_distrl.maths.weighted_losses import differentiable_kl
from rllib_distrl.method.batch import SequenceBatch, of_batch
from rllib_distrl.method.registry import Stage, register
from rllib_distrl.settings import Count, NotNegative, Positive, Rate, Share


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
        estimator: "k2" or "k3"; see `maths.losses.kl_estimate`.

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


TEMPERATURE = "sampling_temperature"
"""What a controller of the sampler moves: `[rollout] temperature`, from the next batch on."""


def _check_entropy_temperature(
    *, target: float | None, horizon: int | None, low: float, high: float, **_: Any
) -> None:
    if not low < high:
        raise ValueError(f"controller 'entropy_temperature' needs low < high; got {low}, {high}")


@register(
    "controller",
    "entropy_temperature",
    needs=("entropy",),
    check=_check_entropy_temperature,
    ignores=lambda settings: set() if settings["horizon"] else {"annealed_share", "annealed_to"},
)
class EntropyTemperature:
    """T ← T (1 + T ln(H*/H) / (ln V + ln ln V)): sampling is hotter where the entropy has fallen.

    H is the last batch's mean entropy at T, H* the first batch's, which falls by a cosine to
    `annealed_to` H* over the last part of the horizon. E3 (arXiv 2505.18573), as its authors' code
    computes it; V is the vocabulary. With `target = 0.3` and no horizon it keeps the
    temperature-adjusted entropy that AceReason-Nemotron 1.1 (arXiv 2506.13284) chooses T for, by
    this rule (our choice). The bounds on T are our choice too. What samples is what learns: the
    learner takes the batch's own temperature.

    Attributes:
        setting: What it moves.
        temperature: Of the next batch; None before the first one, which `[rollout]` decides.
    """

    setting = TEMPERATURE

    def __init__(
        self,
        *,
        target: Positive | None = None,
        horizon: Count | None = None,
        annealed_share: Share = 0.4,
        annealed_to: Rate = 0.9,
        low: Positive = 0.5,
        high: Positive = 2.0,
    ):
        self.temperature: float | None = None
        self._first, self._steps, self._horizon = target, 0, horizon
        self._share, self._to, self._low, self._high = annealed_share, annealed_to, low, high

    def update(
        self, entropy: float, mean_return: float, temperature: float, vocab_size: int
    ) -> float:
        """Takes what was sampled and gives the temperature for the next batch.

        Args:
            entropy: Mean token entropy of the iteration's batch, in nats.
            mean_return: Not read.
            temperature: T of the batch.
            vocab_size: V.

        Returns:
            T within the bounds.
        """
        del mean_return
        entropy = max(entropy, 1e-6)
        if self._first is None:
            self._first = entropy
        width = math.log(vocab_size) + math.log(math.log(vocab_size))
        moved = temperature * (1.0 + temperature * math.log(self._target / entropy) / width)
        self.temperature = min(max(moved, self._low), self._high)
        self._steps += 1
        return self.temperature

    @property
    def _target(self) -> float:
        """H* after the steps so far."""
        assert self._first is not None
        if self._horizon is None:
            return self._first
        begin = self._horizon - int(self._share * self._horizon)
        progress = (self._steps - begin) / max(self._horizon - begin, 1)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return self._first * ((1.0 - self._to) * cosine + self._to)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"temperature": self.temperature, "first": self._first, "steps": self._steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores `get_state()`'s result."""
        self.temperature, self._first = state["temperature"], state["first"]
        self._steps = state["steps"]


class Controllers:
    """The controllers of a method at work; each moves one setting."""

    def __init__(self, stages: Sequence[Stage]):
        """Starts them.

        Raises:
            ValueError: for a setting out of bounds.
        """
        self._stages = stages
        self._controllers = {stage.name: stage() for stage in stages}

    @property
    def moves_temperature(self) -> bool:
        """Whether one of them decides the sampling temperature."""
        return any(each.setting == TEMPERATURE for each in self._controllers.values())

    @property
    def temperature(self) -> float | None:
        """What the next batch is to be sampled at; None: as `[rollout]` says."""
        moved = (one for one in self._controllers.values() if one.setting == TEMPERATURE)
        return next((one.temperature for one in moved), None)

    def update(
        self, batch: SequenceBatch, temperature: float = 1.0, vocab_size: int = 2
    ) -> dict[str, float]:
        """Shows them an iteration's batch, over all learners.

        Args:
            batch: with ``entropy``, where there is a controller.
            temperature: at which the batch was sampled.
            vocab_size: of the model.

        Returns:
            Setting to the value that holds in this iteration, of the sampler in the next one.
        """
        if not self._controllers:
            return {}
        for stage in self._stages:
            stage.prepare(batch)
        entropy = float(masked_mean(batch.column("entropy"), batch.loss_mask, batch.all_reduce))
        rows = torch.ones_like(batch.returns, dtype=torch.bool)
        mean_return = float(masked_mean(batch.returns, rows, batch.all_reduce))
        told = entropy, mean_return, temperature, vocab_size
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
