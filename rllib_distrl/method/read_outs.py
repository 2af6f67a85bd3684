"""The read-outs of `maths.read_outs` by name: (quantiles (…, N), level) to (…)."""

from collections.abc import Callable

from torch import Tensor

from rllib_distrl.maths.read_outs import READ_OUTS, read_out
from rllib_distrl.method.registry import register


def _named(name: str) -> Callable[..., Tensor]:
    def value(quantiles: Tensor, *, level: float | None = None) -> Tensor:
        return read_out(quantiles, name, level)

    return value


for _name in READ_OUTS:
    register("read_out", _name, needs=("quantiles",))(_named(_name))
