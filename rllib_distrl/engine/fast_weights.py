"""The fast decoder's own tensors: fused, and addressable under their Hugging Face names.

Query and key rows are stored with the two halves of each rotary pair next to each other, so that
the rotation is one complex multiplication; attention scores do not depend on that order. In float32
on CPU the matrices of the layers are stored transposed, inputs first: a product with few rows then
spends no time on rearranging the weights (16 rows: 0.8 instead of 1.3 ms for a million of them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ACTIVATIONS = ("silu", "swish")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2, Qwen3 or Llama decoder, read from its Hugging Face config."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def qk_heads(self) -> int:
        """Query and key heads together."""
        return self.heads + self.kv_heads

    @property
    def qkv(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.qk_heads + self.kv_heads) * self.head_dim


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why the fast decoder cannot run this config, or None if it can."""
    if config.model_type not in ("qwen2", "qwen3", "llama"):
        return f"model_type={config.model_type!r} is none of qwen2, qwen3, llama"
    if config.hidden_act not in _ACTIVATIONS:
        return f"hidden_act={config.hidden_act!r}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "it has sliding-window layers"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        return f"rope_type={rope_type!r} changes with the sequence length"
    return None


def shape_of(config: PreTrainedConfig) -> Shape:
    """Sizes and options of the decoder described by a Qwen2, Qwen3 or Llama config."""
    qwen2 = config.model_type == "qwen2"
    bias = bool(getattr(config, "attention_bias", False))
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=config.model_type == "qwen3",
    )


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are (out, in); q and k rows interleave the rotary pairs."""

    index: int
    norm_in: torch.Tensor
    norm_post: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    out_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass
class FastWeights:
    """All weights of the decoder.

    Attributes:
        views: Hugging Face name to a view of the fused storage whose row-major order is that of
            the Hugging Face tensor.
        shapes: Hugging Face name to the Hugging Face shape.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    layers: list[LayerWeights] = field(default_factory=list)
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.shape
        self.embed = self._tensor("model.embed_tokens.weight", s.vocab, s.hidden)
        for index in range(s.layers):
            self.layers.append(self._layer(index))
        self.norm = self._tensor("model.norm.weight", s.hidden)
        self.head = self.embed if s.tied else self._tensor("lm_head.weight", s.vocab, s.hidden)

    def _empty(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, device=self.device, dtype=self.dtype)

    def _matrix(self, *size: int) -> torch.Tensor:
        """An (out, in) matrix, or an (out,) bias, in the layout that products like best."""
        if self.device.type == "cpu" and self.dtype == torch.float32:
            return self._empty(*reversed(size)).t()
        return self._empty(*size)

    def _tensor(self, name: str, *size: int) -> torch.Tensor:
        """A tensor stored exactly as Hugging Face stores it."""
        return self._name(name, self._empty(*size))

    def _name(self, name: str, view: torch.Tensor, rotary_heads: int = 0) -> torch.Tensor:
        """Registers a view under a Hugging Face name, undoing the rotary interleaving."""
        self.shapes[name] = view.shape
        if rotary_heads:
            pairs = view.view(rotary_heads, self.shape.head_dim // 2, 2, -1)
            self.views[name] = pairs.transpose(1, 2)
        else:
            self.views[name] = view
        return view

    def _layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        s, attn, mlp = self.shape, prefix + "self_attn.", prefix + "mlp."
        layer = LayerWeights(
            index=index,
            norm_in=self._tensor(prefix + "input_layernorm.weight", s.hidden),
            norm_post=self._tensor(prefix + "post_attention_layernorm.weight", s.hidden),
            qkv=self._fused_qkv(attn, "weight", s.hidden),
            out=self._name(attn + "o_proj.weight", self._matrix(s.hidden, s.heads * s.head_dim)),
            gate_up=self._fused_gate_up(mlp, "weight", s.hidden),
            down=self._name(mlp + "down_proj.weight", self._matrix(s.hidden, s.inner)),
        )
        if s.qkv_bias:
            layer.qkv_bias = self._fused_qkv(attn, "bias")
        if s.out_bias:
            layer.out_bias = self._tensor(attn + "o_proj.bias", s.hidden)
        if s.mlp_bias:
            layer.gate_up_bias = self._fused_gate_up(mlp, "bias")
            layer.down_bias = self._tensor(mlp + "down_proj.bias", s.hidden)
        if s.qk_norm:
            layer.q_norm = self._name(attn + "q_norm.weight", self._empty(s.head_dim), 1)
            layer.k_norm = self._name(attn + "k_norm.weight", self._empty(s.head_dim), 1)
        return layer

    def _fused_qkv(self, prefix: str, kind: str, *columns: int) -> torch.Tensor:
        """One tensor for the q, k and v projections' weights or biases."""
        s = self.shape
        fused = self._matrix(s.qkv, *columns)
        q, k, v = fused.split([n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)])
        self._name(f"{prefix}q_proj.{kind}", q, rotary_heads=s.heads)
        self._name(f"{prefix}k_proj.{kind}", k, rotary_heads=s.kv_heads)
        self._name(f"{prefix}v_proj.{kind}", v)
        return fused

    def _fused_gate_up(self, prefix: str, kind: str, *columns: int) -> torch.Tensor:
        """One tensor for the gate and up projections' weights or biases, gate first."""
        fused = self._matrix(2 * self.shape.inner, *columns)
        gate, up = fused.chunk(2)
        self._name(f"{prefix}gate_proj.{kind}", gate)
        self._name(f"{prefix}up_proj.{kind}", up)
        return fused


def rotary_table(config: PreTrainedConfig, length: int, device: torch.device) -> torch.Tensor:
    """Rotations of positions 0 … length - 1.

    Args:
        config: A Qwen2, Qwen3 or Llama config.
        length: Number of positions.
        device: Where to put the table.

    Returns:
        (length, head_dim / 2) complex64: attention scaling times exp(i · position · frequency),
        computed in float32 by Hugging Face's own rotary module.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Qwen2 and Qwen3 use this very module under their own names.
    rotary = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
    positions = torch.arange(length).unsqueeze(0)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half]).to(device)
