"""The decoder's matrix products with what can be fused into them.

On CPU in float32 with AVX-512, the BLAS behind `torch.mm` is the fastest (8 to 64 rows on an AMD
EPYC of the fourth generation). Without, oneDNN's kernels with fused epilogues are about twice as
fast on AMD processors (64 to 256 rows). Both read plain, unpacked weights: loading needs no
repacking. The choice depends on the processor alone, so that results can be repeated.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class GatedPair:
    """The gate and up projections: fused, and as the two halves of the same storage."""

    fused: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None

    @classmethod
    def of(cls, fused: torch.Tensor, bias: torch.Tensor | None) -> "GatedPair":
        """Splits (2 I, H) weights and (2 I,) biases, gate first."""
        gate, up = fused.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return cls(fused, gate, up, bias, gate_bias, up_bias)


class PlainLinear:
    """Any device and type. x is (N, in), weights are (out, in).

    Attributes:
        row_step: Numbers of rows to prefer are multiples of it.
    """

    row_step = 16

    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b, (N, out)."""
        return F.linear(x, weight, bias)

    @staticmethod
    def linear_add(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """Residual + X Wᵀ + b, (N, out); may overwrite the residual."""
        return residual.add_(F.linear(x, weight, bias))

    @staticmethod
    def gated(x: torch.Tensor, pair: GatedPair) -> torch.Tensor:
        """SiLU(X Gᵀ) · X Uᵀ, (N, I)."""
        gate, up = F.linear(x, pair.fused, pair.bias).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """X / sqrt(mean(x²) + eps) · weight, (N, H)."""
        return F.rms_norm(x, weight.shape, weight, eps)


@cache
def _averaging(width: int) -> torch.Tensor:
    """(H, 1): a product with it is a mean, which BLAS computes faster than `torch.mean`."""
    return torch.full((width, 1), 1.0 / width)


class CpuLinear(PlainLinear):
    """CPU, float32."""

    @staticmethod
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """X / sqrt(mean(x²) + eps) · weight, (N, H)."""
        scale = torch.mm(x * x, _averaging(x.shape[1])).add_(eps).rsqrt_()
        return (x * scale).mul_(weight)


class BlasLinear(CpuLinear):
    """CPU, float32: additions and activations in place."""

    row_step = 1

    @staticmethod
    def linear_add(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """Residual + X Wᵀ + b, (N, out); overwrites the residual."""
        residual = residual if bias is None else residual.add_(bias)
        return residual.addmm_(x, weight.t())

    @staticmethod
    def gated(x: torch.Tensor, pair: GatedPair) -> torch.Tensor:
        """SiLU(X Gᵀ) · X Uᵀ, (N, I)."""
        gate = F.silu(F.linear(x, pair.gate, pair.gate_bias), inplace=True)
        return gate.mul_(F.linear(x, pair.up, pair.up_bias))


class OneDnnLinear(CpuLinear):
    """CPU, float32: the operators behind PyTorch's own compiler on CPU.

    Kernels are generated for each number of rows when it is first seen, which costs several steps.
    """

    @staticmethod
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X Wᵀ + b, (N, out)."""
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")

    @staticmethod
    def linear_add(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """Residual + X Wᵀ + b, (N, out)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")

    @staticmethod
    def gated(x: torch.Tensor, pair: GatedPair) -> torch.Tensor:
        """SiLU(X Gᵀ) · X Uᵀ, (N, I)."""
        pointwise = torch.ops.mkldnn._linear_pointwise
        gate = pointwise.default(x, pair.gate, pair.gate_bias, "swish", [], "")
        return pointwise.binary(x, gate, pair.up, pair.up_bias, "mul")


def linear_kernels(device: torch.device, dtype: torch.dtype) -> type[PlainLinear]:
    """The fastest kernels for tensors of this kind that give the right numbers here."""
    if device.type != "cpu" or dtype != torch.float32:
        return PlainLinear
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return BlasLinear
    if not torch.backends.mkldnn.is_available():
        return PlainLinear
    weight = torch.linspace(-1.0, 1.0, 32 * 16).view(32, 16)
    pair = GatedPair.of(weight, weight[:, 0].contiguous())
    x = weight[:4].clone()
    try:
        got = OneDnnLinear.linear_add(OneDnnLinear.gated(x, pair), weight, None, x @ weight.T)
    except (RuntimeError, AttributeError, NotImplementedError):
        return PlainLinear
    want = PlainLinear.linear_add(PlainLinear.gated(x, pair), weight, None, x @ weight.T)
    return OneDnnLinear if torch.allclose(got, want, atol=1e-5) else PlainLinear
