"""Weights under their Hugging Face names: checking, copying and hashing them."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import torch

from rllib_distrl.engine.sampling import uniform_words

# Names under which Hugging Face stores an output head that may be tied to the embeddings.
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


# Words per row of the multilinear hash: keys and one row's products fill a core's L2 cache.
_ROW = 1 << 15
_KEY_SEED = 0x9D157


@lru_cache
def _keys(device: torch.device) -> torch.Tensor:
    """(_ROW,) odd int64 keys, the same everywhere."""
    words = uniform_words([(_KEY_SEED,)], _ROW)[0]
    return torch.from_numpy(words.view("int64") | 1).to(device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order as int64, zeros behind the last."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    if len(raw) % 8:
        raw = torch.nn.functional.pad(raw, (0, -len(raw) % 8))
    return raw.view(torch.int64)


def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Σ kᵢ wᵢ modulo 2⁶⁴ of every row (R, n): shape (R,)."""
    if rows.is_cpu:
        return rows @ keys
    scratch = torch.empty_like(keys)  # GPUs have no product of integer matrices
    sums = [torch.mul(row, keys, out=scratch).sum() for row in rows]
    return torch.stack(sums) if sums else rows.new_empty(0)


def _digest(tensor: torch.Tensor) -> bytes:
    """Multilinear hash of each row of words, then BLAKE2b of all rows' hashes.

    A row's hash is Σ kᵢ wᵢ modulo 2⁶⁴ with odd keys k: every change of one word is seen, and
    others with probability 1 - 2⁻⁶³ (Lemire & Kaser, "Strongly universal string hashing is fast",
    2014). It runs where the tensor is, at the speed of its memory.
    """
    words = _words(tensor)
    keys, whole = _keys(words.device), len(words) // _ROW * _ROW
    rows, rest = words[:whole].view(-1, _ROW), words[whole:]
    hashes = [_products(rows, keys), _products(rest.view(1, -1), keys[: len(rest)])]
    total = hashlib.blake2b(digest_size=32)
    total.update(f"{tensor.dtype} {tensor.numel()} ".encode())
    total.update(torch.cat(hashes).cpu().numpy().tobytes())
    return total.digest()


def content_hash(state: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> str:
    """Names and contents of a causal LM's weights as one short string.

    An output head whose content is that of another tensor of its shape (a tied head) is
    counted once, whether the state dict lists it or not.

    Args:
        state: Tensors under their Hugging Face names, on any device.
        dtype: Casts every tensor first: the type in which an engine holds them.

    Returns:
        64 hexadecimal digits. Equal for equal names, types and bytes.
    """
    digests = {name: _digest(_cast(state[name], dtype)) for name in sorted(state)}
    for head in _HEAD_NAMES:
        if head in digests and list(digests.values()).count(digests[head]) > 1:
            del digests[head]
    return combine(digests)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in another floating type; integer tensors stay."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def combine(digests: Mapping[str, bytes]) -> str:
    """One hash over (name, digest) pairs, sorted by name."""
    total = hashlib.blake2b(digest_size=32)
    for name in sorted(digests):
        total.update(name.encode() + b"\0" + digests[name])
    return total.hexdigest()


def _tied(state: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether this is an output head that repeats another tensor."""
    head = state[name]
    return name in _HEAD_NAMES and any(
        other.shape == head.shape
        and (other.data_ptr() == head.data_ptr() or torch.equal(other, head))
        for key, other in state.items()
        if key != name
    )


def check_names(state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Compares a state dict with what an engine holds.

    Args:
        state: What is to be loaded; may repeat tied embeddings as an output head.
        shapes: Name to shape of everything the engine needs.

    Raises:
        ValueError: With the first names that are missing, unexpected or mis-shaped.
    """
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes and not _tied(state, name)]
    shaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shaped))
    found = "; ".join(
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
        for kind, names in problems
        if names
    )
    if found:
        raise ValueError(
            f"These weights do not fit the engine's model ({found}). "
            "Pass the state dict of a causal LM made from the same config."
        )


def copy_weights(state: Mapping[str, torch.Tensor], views: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors of equal row-major order into views of the engine's storage, in place."""
    for name, view in views.items():
        view.copy_(state[name].detach().reshape(view.shape))
