"""Parameters shared out among learners: PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each learner holds its part of every parameter, of its gradient and of the optimiser's moments, and
gathers a block while it computes with it (Rajbhandari et al. 2020, ZeRO stage 3, arXiv 1910.02054;
Zhao et al. 2023, arXiv 2304.11277). Whatever gathers must be done by all learners at once.

FSDP2 takes a second to import, so what is not sharded goes without it.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Root(nn.Module):
    """What gathers the parameters that are in no unit: norms, value heads, tied embeddings."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class Sharding:
    """Shares a module's parameters out among all learners.

    Units are gathered for themselves while they run: each block, each embedding and each LM head.
    All that is in no unit is gathered together, for a whole pass: there a weight stays that is
    embedding and head in one. State dicts of the module and of its parts are whole and plain; see
    `whole`.
    """

    def __init__(
        self, module: nn.Module, models: Sequence[Any], device: torch.device, precision: str
    ):
        """Shards ``module`` in place, unit by unit, on its way to ``device``.

        Args:
            module: with weights that are the same on all learners.
            models: the Hugging Face models in it.
            device: this learner's.
            precision: "fp32"; or "bf16", whose blocks are gathered in bfloat16 and whose gradients
                are summed in float32.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if device.index is not None:
            torch.cuda.set_device(device)  # The mesh takes each process's present device.
        self._device, self._depth = device, 0
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._of_blocks = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32 if precision == "bf16" else None,
            cast_forward_inputs=False,
        )
        self._root: Any = self._shard(module, models)

    def _shard(self, module: nn.Module, models: Sequence[Any]) -> Any:
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        blocks, (embeddings, heads) = blocks_of(module), _untied_ends(models)
        units = [*blocks, *embeddings, *heads]
        uses = Counter(id(weight) for unit in units for weight in unit.parameters())
        for unit in units:
            _copy_weights(unit, {key for key, count in uses.items() if count > 1})
            types = self._of_blocks if unit in blocks else MixedPrecisionPolicy()
            fully_shard(unit, mesh=self._mesh, mp_policy=types)
        for embedding in embeddings:
            embedding.set_unshard_in_backward(False)  # Its gradient needs no weights.
        for head in heads:
            head.run = _run
            register_fsdp_forward_method(head, "run")
        root = fully_shard(_Root(module), mesh=self._mesh)
        for part in module.modules():
            if any(map(is_sharded, part.parameters(recurse=False))):
                part.register_state_dict_post_hook(_make_whole)
                part.register_load_state_dict_pre_hook(_take_shares)
        return root

    def shard_beside(self, model: Any) -> Callable[[], contextlib.AbstractContextManager]:
        """Shards a frozen Hugging Face model too, before the first pass; returns what gathers it.

        Args:
            model: runs within `gathered` alone.
        """
        root = self._shard(model, [model])
        self._root.add_module("beside", root)

        @contextlib.contextmanager
        def gathered() -> Iterator[None]:
            root.unshard()
            try:
                yield
            finally:
                root.reshard()

        return gathered

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the module may run, without gradients: what is in no unit is gathered."""
        if not self._depth:
            self._root(lambda: None)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._root.reshard()

    def differentiable(self, compute: Callable[[], Tensor]) -> Tensor:
        """A loss that ``compute`` makes of the module; its backward pass must follow.

        That leaves in each parameter's ``grad`` this learner's share of the mean over learners.
        """
        return self._root(compute)

    def in_step(self, parts: list[Tensor]) -> list[Tensor]:
        """As many micro-batches on each learner as the most that one has.

        Args:
            parts: indices of rows, at least one.

        Returns:
            ``parts``, and the first row again as often as another learner has more.
        """
        count = torch.tensor(len(parts), device=self._device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return parts + [parts[0][:1]] * (int(count) - len(parts))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that Transformers marks as units of computation, in all trunks of a module."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def _untied_ends(models: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Embeddings and LM heads of models, without those of which one weight is both."""
    embeddings = [model.get_input_embeddings() for model in models]
    heads = [head for model in models if (head := model.get_output_embeddings()) is not None]
    tied = {head.weight for head in heads} & {embedding.weight for embedding in embeddings}
    return (
        [embedding for embedding in embeddings if embedding.weight not in tied],
        [head for head in heads if head.weight not in tied],
    )


def _run(compute: Callable[[Tensor], Any], states: Tensor) -> Any:
    return compute(states)


def with_weights(head: Any, compute: Callable[[Tensor], Any], states: Tensor) -> Any:
    """``compute(states)``, which reads an LM head's weights and does not call it.

    A head that is a unit is gathered for it, and again for the backward pass.
    """
    return getattr(head, "run", _run)(compute, states)


def _copy_weights(unit: nn.Module, shared: set[int]) -> None:
    """Gives a unit its own copy of weights that it shares: FSDP2 gathers a weight in one place."""
    for part in unit.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if id(weight) in shared:
                setattr(part, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, of which each learner holds a share."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This learner's share of a tensor; one that is not sharded itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A sharded tensor as a plain one on the CPU; asked by all learners at once.

    The first learner alone gets its numbers, the others zeros that take no memory.
    """
    if not is_sharded(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    if dist.get_rank() == 0:
        return full.cpu()
    return torch.zeros((), dtype=full.dtype).expand(full.shape)


def share_of(tensor: Tensor, parameter: Any) -> Tensor:
    """This learner's share of a plain tensor, sharded as ``parameter`` is; else the tensor itself.

    Args:
        tensor: the same on all learners, on any device.
        parameter: of the same shape; of one that is sharded the result has the device.
    """
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, own = parameter.device_mesh, parameter.to_local()
    rows = math.ceil(len(tensor) / mesh.size())
    start = rows * mesh.get_local_rank()
    return DTensor.from_local(
        tensor[start : start + rows].to(own.device),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _make_whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _weight in module.named_parameters(recurse=False):
        state[prefix + name] = whole(state[prefix + name])


def _take_shares(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, weight in module.named_parameters(recurse=False):
        given = state.get(prefix + name)
        if given is not None and given.shape == weight.shape:
            state[prefix + name] = share_of(given, weight)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
    """A hook on an optimiser's ``state_dict``: its moments whole and plain, see `whole`."""
    moments = {
        number: {name: whole(x) if isinstance(x, Tensor) else x for name, x in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": moments}


def optimizer_shares(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state with this learner's shares of the moments.

    Args:
        optimizer: of sharded parameters.
        state: as `whole_optimizer_state` gives it, also as NumPy arrays.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def shared_out(value: Any, parameter: Tensor) -> Any:
        if tuple(getattr(value, "shape", ())) != tuple(parameter.shape):
            return value
        return share_of(torch.as_tensor(value), parameter)

    moments = {
        number: {name: shared_out(x, parameters[number]) for name, x in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": moments}
