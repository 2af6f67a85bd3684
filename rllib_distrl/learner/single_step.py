"""Where an update is one optimiser step of one micro-batch: one forward pass serves it all."""

from collections.abc import Collection
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_distrl.learner.minibatches import model_inputs
from rllib_distrl.model.sequences import from_columns


class SingleStep:
    """The forward pass of the only step, run before the stages, which read what it tells.

    Attributes:
        possible: Whether the update is one step on one learner.
    """

    def __init__(self) -> None:
        """Starts without a forward pass."""
        self.possible = False
        self._outputs: dict[str, Any] | None = None

    def start(self, *, possible: bool) -> None:
        """Begins an update, or ends one."""
        self.possible = possible
        self._outputs = None

    def columns(
        self, module: Any, columns: dict[str, Tensor], budget: int, needs: Collection[str]
    ) -> dict[str, Tensor]:
        """Runs and keeps the forward pass, if the batch is one micro-batch.

        Args:
            module: RLlib's module of modules.
            columns: of `SequencesFromEpisodes`.
            budget: most tokens of a micro-batch.
            needs: what the stages read.

        Returns:
            What the pass tells of that; empty where there is none.
        """
        forward = training_forward(module, columns, budget) if self.possible else None
        if forward is None:
            return {}
        rows, self._outputs = forward
        return columns_of_forward(module[DEFAULT_MODULE_ID].unwrapped(), rows, self._outputs, needs)

    def take(self) -> dict[str, Any] | None:
        """The forward pass that was kept, by module; it serves once."""
        outputs, self._outputs = self._outputs, None
        return None if outputs is None else {DEFAULT_MODULE_ID: outputs}


def training_forward(
    module: Any, columns: dict[str, Tensor], budget: int
) -> tuple[Tensor, dict[str, Any]] | None:
    """The forward pass, with gradients, of a batch that is a single micro-batch.

    If it also is a single optimiser step, the weights of that step are those of the pass before
    it, and one forward pass serves both.

    Args:
        module: RLlib's module of modules.
        columns: of `SequencesFromEpisodes`.
        budget: most tokens of a micro-batch.

    Returns:
        The order of the rows, as a step takes them, and the outputs; None for several
        micro-batches.
    """
    sequences = from_columns(columns)
    parts = module[DEFAULT_MODULE_ID].unwrapped().micro_batches(sequences, budget)
    if len(parts) > 1:
        return None
    inputs = {DEFAULT_MODULE_ID: model_inputs(sequences.rows(parts[0]))}
    return parts[0], module.forward_train(inputs)[DEFAULT_MODULE_ID]


@torch.no_grad()
def columns_of_forward(
    module: Any, rows: Tensor, outputs: dict[str, Any], needs: Collection[str]
) -> dict[str, Tensor]:
    """What `training_forward` tells about the batch: quantiles and entropy, where needed."""
    found = {}
    if "quantiles" in needs:
        found["quantiles"] = module.compute_quantiles({}, outputs[Columns.EMBEDDINGS])
    if "entropy" in needs:
        found["entropy"] = outputs[Columns.ACTION_DIST_INPUTS][..., 1].detach()
    back = torch.argsort(rows)
    return {name: column[back] for name, column in found.items()}
