"""Uncertainties that are learned beside the critic, as statistics of the optimism bonus."""

from typing import Any, ClassVar, Protocol

import torch
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from torch import Tensor

from rllib_distrl.maths.advantages import returns_to_go
from rllib_distrl.maths.optimism import elliptical_distance, second_moment
from rllib_distrl.maths.packing import split_by_token_budget
from rllib_distrl.maths.statistics import AllReduce, masked_mean
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.model.critics import Ensemble
from rllib_distrl.model.sequences import Sequences, from_columns
from rllib_distrl.settings import DistanceSettings, EnsembleSettings, TrainingSettings

# The column of the batch that `Distance.features` makes of hidden states.
FEATURES = "features"


class Uncertainty(Protocol):
    """What is learned beside the critic.

    Attributes:
        name: the registered `bonus_statistic` that reads it.
    """

    name: ClassVar[str]

    def statistic(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> Tensor:
        """(B, T), how uncertain each state is; only looks."""
        ...

    def learn(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> dict[str, float]:
        """Learns from the batch of the last `statistic`, once per update; returns metrics."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``."""
        ...


def make_uncertainty(
    name: str,
    module: Any,
    settings: TrainingSettings,
    *,
    gamma: float,
    minibatch_size: int | None,
    seed: int,
) -> Uncertainty | None:
    """What a bonus statistic needs beside the critic; None for one of the quantiles.

    Args:
        name: of the statistic.
        module: `CausalLMModule`, on its device.
        settings: with its table.
        gamma: discount.
        minibatch_size: sequences per optimiser step of an ensemble; None: all.
        seed: of members and projections.
    """
    if name == Disagreement.name:
        ensemble = EnsembleSettings(**settings.ensemble)
        return Disagreement(ensemble, module, gamma, minibatch_size, seed)
    if name == Distance.name:
        return Distance(DistanceSettings(**settings.distance), module, seed)
    return None


class Disagreement:
    """Standard deviation over an ensemble's values; every member learns the observed return."""

    name: ClassVar[str] = "ensemble"

    def __init__(
        self,
        settings: EnsembleSettings,
        module: Any,
        gamma: float,
        minibatch_size: int | None,
        seed: int,
    ):
        """Draws the members; equal on all learners."""
        self._settings = settings
        self._embed, self._gathered = module.policy.get_input_embeddings(), module.gathered
        self._budget, self._minibatch = module.micro_batch_tokens, minibatch_size
        self._gamma = gamma
        self._ensemble = Ensemble(
            self._embed.weight.shape[1],
            size=self._settings.size,
            width=self._settings.width,
            depth=self._settings.depth,
            prior_scale=self._settings.prior_scale,
            seed=seed,
        ).to(self._embed.weight.device)
        self._optimizer = torch.optim.Adam(self._ensemble.members.parameters(), self._settings.lr)

    def statistic(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> Tensor:
        """(B, T), disagreement in each state, in units of the return; zeros in the padding."""
        sequences = from_columns(columns)
        found = torch.zeros_like(rollouts.action_logp)
        with torch.no_grad(), self._gathered():
            for rows in split_by_token_budget(sequences.lengths, self._budget):
                spread = self._values(sequences.rows(rows)).std(0, correction=0)
                found[rows, : spread.shape[1]] = spread
        return torch.where(rollouts.loss_mask, found, 0.0)

    def learn(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> dict[str, float]:
        """One pass over the batch, by squared error to the observed return.

        Not to the critic's targets: these carry the critic's own errors. Returns the metric
        ``ensemble_loss``.
        """
        sequences = from_columns(columns)
        returns = returns_to_go(rollouts.rewards, rollouts.loss_mask, self._gamma)
        if not self._optimizer.state:
            self._ensemble.start_at(
                float(masked_mean(returns, rollouts.loss_mask, rollouts.all_reduce))
            )
        every = torch.arange(len(rollouts), device=returns.device)
        with self._gathered():
            losses = [
                self._step(sequences.rows(rows), returns[rows], rollouts.all_reduce)
                for rows in every.split(self._minibatch or len(rollouts))
            ]
        return {"ensemble_loss": sum(losses) / len(losses)}

    def _step(self, part: Sequences, y: Tensor, all_reduce: AllReduce) -> float:
        """One optimiser step on rows with their returns (B, T); returns a member's mean loss."""
        tokens = all_reduce(part.mask.sum().to(y.dtype))
        self._optimizer.zero_grad()
        total = y.new_zeros(())
        for index in split_by_token_budget(part.lengths, self._budget):
            few = part.rows(index)
            error = self._values(few) - y[index, : few.mask.shape[1]]
            loss = torch.where(few.mask, error, 0.0).square().sum() / tokens
            loss.backward()
            total += loss.detach()
        for parameter in self._ensemble.members.parameters():
            assert parameter.grad is not None
            parameter.grad = all_reduce(parameter.grad)
        self._optimizer.step()
        return float(all_reduce(total)) / self._settings.size

    def _values(self, sequences: Sequences) -> Tensor:
        """(K, B, T), before each token."""
        values = self._ensemble(self._embed(sequences.input_ids))
        return torch.stack([sequences.states(v.unsqueeze(-1)).squeeze(-1) for v in values])

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "ensemble": convert_to_numpy(dict(self._ensemble.state_dict())),
            "optimizer": convert_to_numpy(self._optimizer.state_dict()),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``."""
        weights: Any = convert_to_torch_tensor(state["ensemble"])
        self._ensemble.load_state_dict(weights)
        optimizer = state["optimizer"]
        moments = convert_to_torch_tensor(optimizer["state"], device=self._embed.weight.device)
        self._optimizer.load_state_dict({**optimizer, "state": moments})


class Distance:
    """Elliptical distance of the policy's states from those of the iterations so far."""

    name: ClassVar[str] = "distance"

    def __init__(self, settings: DistanceSettings, module: Any, seed: int):
        """Starts with nothing seen."""
        self._settings = settings
        self._embed = module.policy.get_input_embeddings()
        width = self._embed.weight.shape[1]
        self._projection: Tensor | None = None
        if width > self._settings.features:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(width, self._settings.features, generator=generator)
            self._projection = drawn / self._settings.features**0.5
            width = self._settings.features
        self._moment = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self._count = 0.0
        self._new: tuple[Tensor, float] | None = None

    def statistic(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> Tensor:
        """(B, T), the distance of each state, these states counted as seen; 0 in the padding.

        Reads what `features` made of the states in the pass before the update.
        """
        del columns
        mask = rollouts.loss_mask
        features = rollouts.column(FEATURES)[mask]
        moment = rollouts.all_reduce(second_moment(features))
        count = float(rollouts.all_reduce(mask.sum().double()))
        self._new = moment.cpu(), count
        seen = self._moment.to(moment) + moment
        found = torch.zeros_like(rollouts.action_logp)
        found[mask] = elliptical_distance(
            features, seen, self._count + count, self._settings.ridge
        ).to(found)
        return found

    def learn(self, columns: dict[str, Tensor], rollouts: SequenceBatch) -> dict[str, float]:
        """Counts the states of the last `statistic` as seen; no metrics."""
        del columns, rollouts
        assert self._new is not None
        moment, count = self._new
        self._moment = self._settings.decay * (self._moment + moment)
        self._count = self._settings.decay * (self._count + count)
        return {}

    def features(self, hidden: Tensor) -> Tensor:
        """(…, D + 1): states at length √D, projected, and a constant."""
        hidden = torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
        if self._projection is not None:
            hidden = hidden @ self._projection.to(hidden)
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"moment": self._moment, "count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``."""
        self._moment, self._count = state["moment"], state["count"]
