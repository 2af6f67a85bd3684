"""The critic: its head, from raw outputs to the law of a state, and the loss that teaches it.

A head is a class whose keyword-only arguments are its settings, with `n_outputs`, `support`,
`start`, `law` and `loss` as below. Stages, metrics and viewer read the law alone (`maths.laws.Law`:
mean, std, cdf, quantiles, sample), whatever its head. Below the heads: targets, the actor's value,
and how uncertain a state is.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from rllib_distrl.maths.advantages import TARGETS
from rllib_distrl.maths.heads import (
    bernoulli_logit,
    bernoulli_loss,
    categorical_loss,
    gaussian_loss,
    standard_normal_atoms,
    tilted_logits,
)
from rllib_distrl.maths.laws import Law, read_out, uncertainty
from rllib_distrl.maths.losses import squared_value_loss
from rllib_distrl.maths.optimism import BONUS_STATS
from rllib_distrl.maths.quantiles import (
    READ_OUTS,
    center_delta,
    center_delta_bias,
    check_read_out,
    quantile_huber_loss,
)
from rllib_distrl.method.batch import SequenceBatch, of_batch
from rllib_distrl.method.registry import LEARNED_STATS, Stage, register, resolve
from rllib_distrl.settings import TWIN, Positive, Share, TrainingSettings

_ROUNDING = 1e-5  # sums of rewards may end a little outside
_LOG_STDS = -7.0, 7.0  # of a Gaussian law: from a thousandth to a thousand


class Head(Protocol):
    """What a registered head makes.

    Attributes:
        n_outputs: Raw outputs per state.
        from_data: Whether `fit` is to choose the support by the first batch's returns.
    """

    n_outputs: int
    from_data: bool

    @property
    def support(self) -> tuple[float, ...]:
        """The atoms of its laws, where they are fixed; empty for quantiles."""
        ...

    def fit(self, low: float, high: float) -> None:
        """Lays the support over the returns from `low` to `high`, where it is `from_data`."""
        ...

    def start(self, value: float) -> Tensor:
        """(n_outputs,), the bias with which every law starts around `value`, weights being 0."""
        ...

    def law(self, outputs: Tensor) -> Law:
        """The laws (…, N) of raw outputs (…, n_outputs), with gradient."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """(B, T), of outputs (B, T, n_outputs) and targets (B, T, M); 0 in the padding."""
        ...


class _Fixed:
    """A head whose support no data decides."""

    from_data = False

    def fit(self, low: float, high: float) -> None:
        """See `Head`."""


@register("head", "quantile")
class Quantile(_Fixed):
    """N ordered quantiles by quantile Huber regression; one is a scalar, with RLlib's own loss.

    Its settings are those of `[training]`.
    """

    support = ()

    def __init__(
        self,
        *,
        n_quantiles: int = 16,
        head_center: str = "mean",
        init_spread: float = 0.1,
        quantile_huber_kappa: float = 0.001,
        quantile_loss: str = "pairwise",
        vf_clip_param: float = 10.0,
    ) -> None:
        """Takes the settings."""
        self.n_outputs, self._center, self._spread = n_quantiles, head_center, init_spread
        self._kappa, self._pairing = quantile_huber_kappa, quantile_loss
        self._clip = vf_clip_param

    def start(self, value: float) -> Tensor:
        """See `Head`."""
        return center_delta_bias(self.n_outputs, value, self._spread)

    def law(self, outputs: Tensor) -> Law:
        """See `Head`."""
        return Law(center_delta(outputs, self._center))

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """See `Head`."""
        quantiles = self.law(outputs).atoms
        if self.n_outputs == 1:
            values, y = quantiles.squeeze(-1), targets.squeeze(-1)
            return squared_value_loss(values, y, self._clip, loss_mask)
        return quantile_huber_loss(quantiles, targets, self._kappa, self._pairing, loss_mask)


@register("head", "bernoulli")
class Bernoulli(_Fixed):
    """The probability of success, by cross-entropy; returns in [0, 1].

    For 0/1 returns the law itself; of others in [0, 1] it knows the mean alone.
    """

    n_outputs = 1
    support = (0.0, 1.0)

    def start(self, value: float) -> Tensor:
        """See `Head`."""
        return torch.tensor([bernoulli_logit(value)])

    def law(self, outputs: Tensor) -> Law:
        """See `Head`."""
        logits = torch.cat([-outputs, outputs], dim=-1)
        return _on(self.support, torch.sigmoid(logits))

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """See `Head`."""
        return bernoulli_loss(outputs.squeeze(-1), targets, loss_mask)


def _check_categorical(*, low: float | None, high: float | None, **_: Any) -> None:
    if low is not None and high is not None and not low < high:
        raise ValueError(f"head 'categorical' needs low < high; got {low} and {high}.")


def _no_sigma(settings: Mapping[str, Any]) -> set[str]:
    return {"sigma"} if settings["projection"] == "two_hot" else set()


@register("head", "categorical", check=_check_categorical, ignores=_no_sigma)
class Categorical:
    """Probabilities of evenly spaced returns, by cross-entropy to projected targets."""

    def __init__(
        self,
        *,
        bins: Annotated[int, Field(ge=2)] = 51,
        low: FiniteFloat | None = None,
        high: FiniteFloat | None = None,
        projection: Literal["hl_gauss", "two_hot"] = "hl_gauss",
        sigma: Positive = 0.75,
    ) -> None:
        """Lays out the grid.

        Args:
            bins: Atoms, both ends among them.
            low: Least return; None: of the first batch. A batch of equal returns gets 1 to both
                sides; later targets beyond an end of the first batch count as that end
                (`critic_targets_clipped` is their share). Our choice.
            high: Greatest return, likewise.
            projection: How a target becomes probabilities: "hl_gauss" spreads it, "two_hot" splits
                it between two neighbours, which keeps its mean.
            sigma: Of "hl_gauss", in steps of the grid.
        """
        self.n_outputs = bins
        self.from_data = low is None or high is None
        self._low, self._high = low, high
        self._projection, self._sigma = projection, sigma
        self.fit(0.0 if high is None else high - 1.0, 1.0 if low is None else low + 1.0)

    def fit(self, low: float, high: float) -> None:
        """See `Head`; ends that are given stay."""
        if self._low is not None:
            low, high = self._low, max(high, self._low)
        if self._high is not None:
            low, high = min(low, self._high), self._high
        if not low < high:
            low, high = low - (self._low is None), high + (self._high is None)
        grid = torch.linspace(low, high, self.n_outputs, dtype=torch.float64)
        self.support = tuple(grid.tolist())

    def start(self, value: float) -> Tensor:
        """See `Head`."""
        return tilted_logits(torch.tensor(self.support), value)

    def law(self, outputs: Tensor) -> Law:
        """See `Head`."""
        return _on(self.support, outputs.softmax(-1))

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """See `Head`."""
        atoms = outputs.new_tensor(self.support)
        if self.from_data:
            targets = targets.clamp(self.support[0], self.support[-1])
        return categorical_loss(outputs, targets, atoms, loss_mask, self._projection, self._sigma)


def _check_gaussian(*, n_quantiles: int, **_: Any) -> None:
    if n_quantiles < 2:
        raise ValueError(
            f"head 'gaussian' has a spread, which n_quantiles = {n_quantiles} cannot show. Set "
            "n_quantiles >= 2, or head 'quantile'."
        )


@register("head", "gaussian", check=_check_gaussian)
class Gaussian(_Fixed):
    """A mean and a standard deviation, by β-NLL: a law that knows no more than these two.

    What a critic with a variance head is: the control for laws of any shape. Its laws are
    `n_quantiles` equal atoms, whose mean and standard deviation are exact.
    """

    n_outputs = 2
    support = ()

    def __init__(
        self, *, n_quantiles: int = 16, init_spread: float = 0.1, beta: Share = 0.5
    ) -> None:
        """Takes the settings.

        Args:
            n_quantiles: Of `[training]`.
            init_spread: Of `[training]`: the standard deviation of every law at the start.
            beta: β of `maths.heads.gaussian_loss`.
        """
        self._atoms, self._spread = standard_normal_atoms(n_quantiles).tolist(), init_spread
        self._beta = beta

    def start(self, value: float) -> Tensor:
        """See `Head`."""
        return torch.tensor([value, math.log(self._spread)])

    def law(self, outputs: Tensor) -> Law:
        """See `Head`."""
        mean, log_std = self._parts(outputs)
        std = log_std.exp().unsqueeze(-1)
        return Law(mean.unsqueeze(-1) + std * outputs.new_tensor(self._atoms))

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """See `Head`."""
        return gaussian_loss(*self._parts(outputs), targets, loss_mask, self._beta)

    @staticmethod
    def _parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = outputs.unbind(-1)
        return mean, log_std.clamp(*_LOG_STDS)


def _on(support: tuple[float, ...], probs: Tensor) -> Law:
    return Law(probs.new_tensor(support).expand_as(probs), probs)


class Twin:
    """Two critics side by side, K = 2: in each state the law of the smaller mean is what they say.

    Clipped double learning of DSAC-T (Duan et al. 2023, arXiv 2310.05858; its authors' code): the
    law in a target, whole, is that of the critic whose mean is smaller there, min(V₁, V₂) is the
    actor's value, both critics learn the same targets, and their losses add up. Its third part,
    weights by the running variance and a bound on targets, tames the gradient of a Gaussian law;
    heads here have bounded gradients, so it is left out.
    """

    def __init__(self, head: Head) -> None:
        """Two of a head: raw outputs are the first critic's, then the second's."""
        self.head, self.from_data = head, head.from_data
        self.n_outputs = 2 * head.n_outputs

    @property
    def support(self) -> tuple[float, ...]:
        """See `Head`."""
        return self.head.support

    def fit(self, low: float, high: float) -> None:
        """See `Head`."""
        self.head.fit(low, high)

    def start(self, value: float) -> Tensor:
        """See `Head`; both alike."""
        return self.head.start(value).repeat(2)

    def law(self, outputs: Tensor) -> Law:
        """See `Head`."""
        first, second = map(self.head.law, outputs.chunk(2, dim=-1))
        chosen = (first.mean <= second.mean).unsqueeze(-1)
        atoms = torch.where(chosen, first.atoms, second.atoms)
        if first.probs is None:
            return Law(atoms)
        return Law(atoms, torch.where(chosen, first.weights, second.weights))

    def loss(self, outputs: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
        """See `Head`; the sum of both critics' losses."""
        first, second = outputs.chunk(2, dim=-1)
        return self.head.loss(first, targets, loss_mask) + self.head.loss(
            second, targets, loss_mask
        )


def make_head(settings: Mapping[str, Any]) -> Head:
    """What makes laws of a critic's raw outputs: the head that settings name, or two of it.

    Args:
        settings: As of `head_stage`, and `critic`.

    Raises:
        ValueError: As `head_stage`.
    """
    head = head_stage(settings)()
    return Twin(head) if settings.get("critic") == TWIN else head


def head_stage(settings: Mapping[str, Any]) -> Stage:
    """The head that settings name, bound to those of `[training]` that it has.

    Args:
        settings: With `head` ("quantile" without it) and more, as in `[training]` or a module's
            `model_config`.

    Raises:
        ValueError: As `registry.resolve`, and for a setting of `[training]` in the head's table.
    """
    spec = settings.get("head", "quantile")
    table = {"name": spec} if isinstance(spec, str) else dict(spec)
    shared = resolve("head", table["name"]).method.settings().keys() & TrainingSettings.model_fields
    if twice := sorted(shared & table.keys()):
        raise ValueError(
            f"head {table['name']!r} has {twice[0]}, a setting of [training]. Set it there."
        )
    taken = {name: settings[name] for name in shared & settings.keys()}
    return resolve("head", {**taken, **table}, given=table)


def head_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which law the weights of a value head mean, by the names of settings.

    Args:
        settings: As of `head_stage`.
    """
    stage = head_stage(settings)
    if stage.name == "quantile":
        return {"head": "quantile", **{n: settings[n] for n in ("n_quantiles", "head_center")}}
    return {"head": {"name": stage.name, **stage.settings}}


def check_targets(head: Head, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Refuses targets beyond the atoms that a head was given: it could not learn them.

    Args:
        head: Any.
        targets: (B, T, M).
        loss_mask: (B, T).

    Returns:
        (B, T, M), which targets lie beyond the atoms that a head took from data.

    Raises:
        ValueError: With one of them.
    """
    if not head.support:
        return torch.zeros_like(targets, dtype=torch.bool)
    low, high = head.support[0], head.support[-1]
    slack = _ROUNDING * max(1.0, high - low)
    outside = ((targets < low - slack) | (targets > high + slack)) & loss_mask.unsqueeze(-1)
    if not head.from_data and bool(outside.any()):
        what = "head 'bernoulli'" if isinstance(head, Bernoulli) else "this head"
        raise ValueError(
            f"{what} takes returns in [{low:g}, {high:g}], and is to learn "
            f"{float(targets[outside][0]):g}. Use head 'categorical', with low and high around all "
            "returns or without them, head 'quantile', or leave out reward transforms that move "
            "them."
        )
    return outside


for _name, _formula in TARGETS.items():
    _unread = ("lambda_",) if _name == "monte_carlo" else ()
    register("target", _name)(
        of_batch(
            _formula,
            renamed={"lambda_": "critic_lambda"},
            without=("projection", "uniforms", *_unread),
        )
    )


def _read_out(name: str) -> None:
    def check(*, level: float | None) -> None:
        check_read_out({"name": name, "level": level})

    @register("read_out", name, needs=("quantiles",), check=check)
    def value(law: Law, *, level: float | None = None) -> Tensor:
        """`maths.laws.read_out`."""
        return read_out(law, name, level)

    value.__qualname__ = name


for _name in READ_OUTS:
    _read_out(_name)


def _of_quantiles(name: str) -> None:
    @register("bonus_statistic", name, needs=("quantiles",))
    def statistic(batch: SequenceBatch) -> Tensor:
        """`maths.laws.uncertainty` of the critic's law."""
        return uncertainty(batch.law, name)

    statistic.__qualname__ = name


def _learned(name: str) -> None:
    @register("bonus_statistic", name, needs=(name,))
    def statistic(batch: SequenceBatch) -> Tensor:
        """What the learner learns beside the critic, see `learner.uncertainty`."""
        return batch.column(name)

    statistic.__qualname__ = name


for _name in BONUS_STATS:
    _of_quantiles(_name)
for _name in LEARNED_STATS:
    _learned(_name)
