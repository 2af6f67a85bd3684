"""Log-probability and entropy of tokens straight from hidden states, in chunks.

No (tokens × vocabulary) tensor outlives a chunk, forward or backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits held at once: 256 MB in float32."""

_CPU_BLOCK = 2**22
"""Logits computed at once on a CPU: what passes over them then finds them in a cache."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the output z of its LM head: logits = c tanh(s z / c).

    Attributes:
        scale: s (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, ...).
        cap: c > 0, the soft cap (Gemma 2, eq. in sec. 2 of its report); None: logits = s z.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The logits of z, of the same shape."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else (z / self.cap).tanh() * self.cap


IDENTITY = LogitMap()


def token_logps(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_map: LogitMap = IDENTITY,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Computes log π(target) and entropy H = −Σ_v p_v ln p_v under softmax(f(W h + b)/T).

    Both are differentiable, once, in hidden, weight and bias. Matrix products are of factors in the
    dtype of `hidden` and sum in float32; logits and all that follows from them are float32 (float64
    stays float64), gradients of half precision are rounded to it on a CPU. Up to one chunk the
    softmax is kept for the backward pass; beyond, each chunk is computed again there. Autocast is
    ignored: what `hidden` is decides.

    Args:
        hidden: The last hidden states of M tokens.
        weight: The LM head; may have another dtype than `hidden`.
        targets: The tokens taken.
        bias: Or None.
        temperature: T > 0.
        logit_map: f, what the model does to the head's output.
        chunk: Tokens per chunk; None: by vocabulary size and device.

    Returns:
        logp and entropy, in nats, float32 (or float64).

    Raises:
        ValueError: For a temperature that is not positive.
    """
    if temperature <= 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    chunk = chunk or _chunk(hidden, weight)
    return _TokenLogps.apply(hidden, weight, bias, targets, float(temperature), logit_map, chunk)  # pyright: ignore[reportReturnType]


def score_by_hidden(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_map: LogitMap = IDENTITY,
    chunk: int | None = None,
) -> Float[Tensor, "M H"]:
    """W_y − Σ_v p_v W_v: T times the gradient of log π(y) by the hidden state of a plain head.

    Of no gradient itself. `logit_map` changes p, but is not differentiated.

    Args:
        hidden: The last hidden states of M tokens.
        weight: W, the LM head.
        targets: y, the tokens taken.
        bias: Or None.
        temperature: T > 0.
        logit_map: What the model does to the head's output.
        chunk: Tokens per chunk; None: by vocabulary size and device.
    """
    targets, chunk, found = targets.long(), chunk or _chunk(hidden, weight), []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _logits_head(weight, hidden)
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logps, _ = _log_softmax(h, head, bias, temperature, logit_map)
            mean = _sum_in_float32(logps.exp().to(head.dtype), head)
            found.append(head[y].to(logps.dtype) - mean)
    return torch.cat(found)


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits are held at once."""
    return max(1, CHUNK_LOGITS // weight.shape[0])


def _block(hidden: Tensor, weight: Tensor, chunk: int) -> int:
    """Tokens whose logits are computed at once."""
    of_cpu = max(1, _CPU_BLOCK // weight.shape[0])
    return min(chunk, of_cpu) if hidden.device.type == "cpu" else chunk


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _sum_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of factors in half precision, in float32 where the device gives it unrounded."""
    if _is_half(a) and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


@contextmanager
def _factors_in_bfloat16() -> Iterator[None]:
    """Lets oneDNN multiply float32 as bfloat16, which loses nothing where numbers have that form.

    Three times as fast where the processor has such products; the others ignore it.
    """
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _logits_head(weight: Tensor, hidden: Tensor) -> Tensor:
    """The weight as products with `hidden` see it, in the dtype in which logits are computed.

    PyTorch's CPU products of half precision round their results to it, which logits must not be.
    """
    head = weight.to(hidden.dtype)
    return head.float() if _is_half(head) and head.device.type != "cuda" else head


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, logit_map: LogitMap
) -> tuple[Tensor, Tensor | None]:
    """Logps (M, V), and with a soft cap its slope 1 − tanh²(s z / c) at each logit."""
    if hidden.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        with _factors_in_bfloat16():
            logits = hidden.float() @ weight.t()
    else:
        logits = _sum_in_float32(hidden.to(weight.dtype), weight.t())
    if bias is not None:
        logits += bias
    if logit_map.scale != 1.0:
        logits *= logit_map.scale
    slope = None
    if logit_map.cap is not None:
        logits = logits.div_(logit_map.cap).tanh_()
        slope = 1 - logits.square()
        logits *= logit_map.cap
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(-1), slope


def _logits_gradient(
    logps: Tensor, targets: Tensor, entropy: Tensor, grads: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Differentiates by logits: g_logp (1{v = target} − p_v) − g_H p_v (ln p_v + H), per row."""
    grad_logp, grad_entropy = grads
    p = logps.exp()
    factor = torch.zeros_like(entropy) if grad_logp is None else -grad_logp
    if grad_entropy is None:
        gradient = p.mul_(factor.unsqueeze(-1))
    else:
        factor = (factor - grad_entropy * entropy).unsqueeze(-1)
        gradient = p.mul_(torch.addcmul(factor, grad_entropy.unsqueeze(-1), logps, value=-1))
    if grad_logp is not None:
        index = targets.unsqueeze(-1)
        gradient.scatter_add_(-1, index, grad_logp.unsqueeze(-1).to(gradient.dtype))
    return gradient


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        logit_map: LogitMap,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        targets = targets.long()
        block = _block(hidden, weight, chunk)
        keep = len(hidden) <= chunk
        with torch.autocast(hidden.device.type, enabled=False):
            head = _logits_head(weight, hidden)
            kept, picked, entropies = [], [], []
            for h, y in zip(hidden.split(block), targets.split(block), strict=True):
                logps, slope = _log_softmax(h, head, bias, temperature, logit_map)
                picked.append(logps.gather(-1, y.unsqueeze(-1)).squeeze(-1))
                entropies.append(-(logps.exp() * logps).sum(-1))
                if keep:
                    kept += [logps, slope]
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)
        ctx.temperature, ctx.logit_map, ctx.chunk, ctx.block = temperature, logit_map, chunk, block
        ctx.set_materialize_grads(False)
        return torch.cat(picked), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, entropy, *_ = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(hidden.dtype)
            need_h, need_w, need_b = ctx.needs_input_grad[:3]
            grad_h = torch.empty_like(hidden) if need_h else None
            grad_w = torch.zeros_like(weight, dtype=entropy.dtype) if need_w else None
            grad_b = torch.zeros_like(bias, dtype=entropy.dtype) if need_b else None
            for start in range(0, len(hidden), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                z = torch.cat(list(_gradients_of_products(ctx, rows, grads)))
                if grad_h is not None:
                    grad_h[rows] = z @ head
                if grad_w is not None:
                    grad_w += _sum_in_float32(z.t(), hidden[rows])
                if grad_b is not None:
                    grad_b += z.sum(0, dtype=entropy.dtype)
        grad_w = None if grad_w is None else grad_w.to(weight.dtype)
        grad_b = None if grad_b is None else grad_b.to(bias.dtype)
        return grad_h, grad_w, grad_b, None, None, None, None


def _gradients_of_products(
    ctx: Any, rows: slice, grads: tuple[Tensor | None, ...]
) -> Iterator[Tensor]:
    """Gradients (block, V) by the head's output, in the dtype of the states, of a chunk's rows."""
    hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors
    head = None if kept else _logits_head(weight, hidden)
    parts = [None if x is None else x[rows].split(ctx.block) for x in grads]
    of_rows = zip(*(x[rows].split(ctx.block) for x in (hidden, targets, entropy)), strict=True)
    for i, (h, y, of_block) in enumerate(of_rows):
        if head is None:
            logps, slope = kept[2 * i : 2 * i + 2]
        else:
            logps, slope = _log_softmax(h, head, bias, ctx.temperature, ctx.logit_map)
        grad_logp, grad_entropy = (None if part is None else part[i] for part in parts)
        z = _logits_gradient(logps, y, of_block, (grad_logp, grad_entropy))
        if slope is not None:
            z *= slope
        if ctx.logit_map.scale != 1.0:
            z *= ctx.logit_map.scale
        if ctx.temperature != 1.0:
            z /= ctx.temperature
        yield z.to(hidden.dtype)
