"""What lies between the matrix products of a decoding step, compiled for this processor.

CPU, one thread. Matrix products are BLAS's. Everything is computed in float32; what products read
and give, and keys and values, are float32 or bfloat16 (`lanes`), like the weights.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numba import njit

from rllib_distrl.engine import lanes
from rllib_distrl.engine.kernel_cache import compile_once
from rllib_distrl.engine.lanes import (
    LANES,
    add,
    add_product,
    fill,
    load,
    narrow,
    store,
    swap,
    wide,
)

PAGE = LANES
"""Columns (tokens) per page of the key-value cache."""

# Not "ninf" nor "nnan": filtered logits are -inf, and what is not finite has to be seen.
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
# Functions that kernels share go into each whole. Linked by name instead, a kernel loaded from the
# cache may run another's copy of them, which sums in another order than the one just compiled.
_INLINED = {**_OPTIONS, "inline": "always"}
# Tokens whose probabilities are summed before one of them is looked for.
_BLOCK = 64
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Outside exp is no normal float32.
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_LOG2_E = np.float32(1.44269504)
# log 2 as a number of few bits and a rest (Cody & Waite, 1980).
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# (exp(r) - 1 - r) / r² on |r| <= log(2) / 2 (Cephes, expf).
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.00000012e-1)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)


@njit(**_INLINED)
def _exp(x):
    """Exp(x) of a float32 to 2 units in the last place; 0 below -87, exp(88) above 88."""
    y = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(y * _LOG2_E + np.float32(0.5))
    r = (y - n * _LOG_2_HIGH) - n * _LOG_2_LOW
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    p = p * r * r + r + _ONE
    power = np.int32((np.int32(n) + _BIAS) << _MANTISSA).view(np.float32)
    return p * power if x > _LOWEST else _ZERO


@njit(**_INLINED)
def _normalise(x, weight, eps, out):
    """X / sqrt(mean(x²) + eps) · weight of one vector."""
    total = _ZERO
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    scale = _ONE / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = narrow(x[j] * scale * wide(weight[j]), out)


def rms_norm(x, weight, eps, out):
    """X / sqrt(mean(x²) + eps) · weight of every row; x (N, H) in float32, out (N, H)."""
    for i in range(x.shape[0]):
        _normalise(x[i], weight, eps, out[i])


def accumulate(x, more):
    """X += more; x (N, H) in float32."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] += wide(more[i, j])


def gate(x, bias, out):
    """SiLU(g + b₀) · (u + b₁); x (N, 2, I) holds g and u, bias is (2, I), out (N, I)."""
    for i in range(x.shape[0]):
        for j in range(out.shape[1]):
            g = wide(x[i, 0, j]) + wide(bias[0, j])
            u = wide(x[i, 1, j]) + wide(bias[1, j])
            out[i, j] = narrow(g / (_ONE + _exp(-g)) * u, out)


@njit(**_INLINED)
def _rotate(x, at, rotations, turn, width, out):
    """Turns the pairs of x[at : at + D]; the rotation is 2 D numbers from `turn` on."""
    for d in range(0, width, LANES):
        pairs = load(x, at + d)
        turned = add_product(fill(_ZERO), pairs, load(rotations, turn + d))
        turned = add_product(turned, swap(pairs), load(rotations, turn + width + d))
        store(out, d, turned)


@njit(**_INLINED)
def _write(key, value, at, width, page, column, keys, values):
    """Puts one head's key (D,) and value (D from `at` on) into its page."""
    first = page * width * PAGE
    for d in range(width):
        keys[first + d * PAGE + column] = narrow(key[d], keys)
    if column == 0:  # the columns behind weigh nothing, and nothing times NaN is NaN
        for d in range(0, width * PAGE, LANES):
            store(values, first + d, fill(_ZERO))
    for d in range(0, width, LANES):
        store(values, first + column * width + d, load(value, at + d))


@njit(**_INLINED)
def _score(query, at, width, keys, first, scores, to):
    """Products of a query (D from `at` on) with the 16 keys of a page."""
    s0, s1, s2, s3 = fill(_ZERO), fill(_ZERO), fill(_ZERO), fill(_ZERO)
    for d in range(0, width, 4):
        key = first + d * PAGE
        s0 = add_product(s0, fill(query[at + d]), load(keys, key))
        s1 = add_product(s1, fill(query[at + d + 1]), load(keys, key + PAGE))
        s2 = add_product(s2, fill(query[at + d + 2]), load(keys, key + 2 * PAGE))
        s3 = add_product(s3, fill(query[at + d + 3]), load(keys, key + 3 * PAGE))
    store(scores, to, add(add(s0, s1), add(s2, s3)))


@njit(**_INLINED)
def _softmax(scores, length, scale):
    """Softmax of the first `length` scores times `scale` in place, 0 behind them."""
    best, total = scores[0], _ZERO
    for t in range(length):
        best = max(best, scores[t])
    for t in range(length):
        scores[t] = _exp((scores[t] - best) * scale)
        total += scores[t]
    share = _ONE / total
    for t in range(length):
        scores[t] *= share
    for t in range(length, scores.shape[0]):
        scores[t] = _ZERO


@njit(**_INLINED)
def _collect(shares, start, values, first, width, out, at):
    """Adds the 16 values of a page, weighted, to out[at : at + D]."""
    for d in range(0, width, LANES):
        s0, s1, s2, s3 = load(out, at + d), fill(_ZERO), fill(_ZERO), fill(_ZERO)
        for t in range(0, PAGE, 4):
            value, share = first + t * width + d, start + t
            s0 = add_product(s0, fill(shares[share]), load(values, value))
            s1 = add_product(s1, fill(shares[share + 1]), load(values, value + width))
            s2 = add_product(s2, fill(shares[share + 2]), load(values, value + 2 * width))
            s3 = add_product(s3, fill(shares[share + 3]), load(values, value + 3 * width))
        store(out, at + d, add(add(s0, s1), add(s2, s3)))


def attend(
    qkv, bias, q_norm, k_norm, eps, heads, rotations, positions, rows, tables, keys, values, out
):
    """Rotates queries and keys, writes keys and values, attends to them and what came before.

    Args:
        qkv: (N, heads + 2 kv_heads, D) projections. D is a multiple of 16.
        bias: Of the projections, flat.
        q_norm: (D,), or (0,) for a model without norms of queries and keys.
        k_norm: Likewise.
        eps: Of these norms.
        heads: Query heads.
        rotations: (positions, 2, D), of pairs of neighbours: each one's own factor, then that of
            its neighbour (cos, cos, … and -sin, sin, …).
        positions: (N,) of the tokens; those of one sequence rise.
        rows: (N,) the sequence that each token belongs to.
        tables: (sequences, pages) of the cache.
        keys: A layer's keys, of shape (pages, kv_heads, D, 16) but flat.
        values: A layer's values, of shape (pages, kv_heads, 16, D) but flat.
        out: (N, heads, D).
    """
    n, total, width = qkv.shape
    kv_heads = (total - heads) // 2
    group, scale = heads // kv_heads, _ONE / np.float32(np.sqrt(width))
    given, turns, result = qkv.reshape(-1), rotations.reshape(-1), out.reshape(-1)
    own = np.empty((total, width), np.float32)
    flat, turned = own.reshape(-1), np.empty(width, np.float32)
    scores = np.empty((heads, tables.shape[1] * PAGE), np.float32)
    sums = np.empty(heads * width, np.float32)
    for i in range(n):
        first, turn = i * total * width, positions[i] * 2 * width
        page, column = tables[rows[i], positions[i] // PAGE], positions[i] % PAGE
        for j in range(0, total * width, LANES):
            store(flat, j, add(load(given, first + j), load(bias, j)))
        for h in range(heads + kv_heads):
            if q_norm.shape[0]:
                _normalise(own[h], q_norm if h < heads else k_norm, eps, own[h])
            _rotate(flat, h * width, turns, turn, width, turned)
            if h < heads:
                for d in range(0, width, LANES):
                    store(flat, h * width + d, load(turned, d))
            else:
                at, to = (h + kv_heads) * width, page * kv_heads + h - heads
                _write(turned, flat, at, width, to, column, keys, values)
        # Every page is read once and in order.
        length = positions[i] + 1
        count = -(-length // PAGE)
        for b in range(count):
            page = tables[rows[i], b] * kv_heads
            for h in range(heads):
                at = (page + h // group) * width * PAGE
                _score(flat, h * width, width, keys, at, scores[h], b * PAGE)
        for h in range(heads):
            _softmax(scores[h, : count * PAGE], length, scale)
        for d in range(0, heads * width, LANES):
            store(sums, d, fill(_ZERO))
        for b in range(count):
            page = tables[rows[i], b] * kv_heads
            for h in range(heads):
                at = (page + h // group) * width * PAGE
                _collect(scores[h], b * PAGE, values, at, width, sums, h * width)
        for d in range(0, heads * width, LANES):
            store(result, i * heads * width + d, load(sums, d))


@njit(**_INLINED)
def _exponentials(logits, temperature, out):
    """Exp((x - max) / temperature) in `out`; returns max, and whether all is as it should be."""
    best, sound = logits[0], True
    for j in range(logits.shape[0]):
        best = max(best, logits[j])
        sound &= logits[j] == logits[j]
    for j in range(logits.shape[0]):
        out[j] = _exp((logits[j] - best) / temperature)
    return best, sound and np.isfinite(best)


@njit(**_INLINED)
def _invert_cdf(weights, sums, u):
    """The index at which the cumulative sum first exceeds u times the total, and that total."""
    total = 0.0
    for b in range(sums.shape[0]):
        block = 0.0
        for j in range(b * _BLOCK, min((b + 1) * _BLOCK, weights.shape[0])):
            block += weights[j]
        sums[b] = block
        total += block
    below, b = 0.0, 0
    while b < sums.shape[0] - 1 and below + sums[b] <= u * total:
        below += sums[b]
        b += 1
    found = 0
    for j in range(b * _BLOCK, min((b + 1) * _BLOCK, weights.shape[0])):
        # Sums in another order may miss the target in the last digit: then the last one counts.
        if weights[j] > _ZERO:
            found = j
            below += weights[j]
            if below > u * total:
                break
    return found, total


def draw(logits, u, temperature, greedy, tokens, logps, entropies):
    """Draws one token per row in vocabulary order.

    Args:
        logits: (B, V).
        u: (B,) float64 uniforms in [0, 1).
        temperature: Divides the logits.
        greedy: Takes the (first) most probable token instead.
        tokens: (B,) int64, filled.
        logps: (B,), filled.
        entropies: (B,) in nats, filled, or (0,).

    Returns:
        The first row whose logits hold NaN or have no finite largest one, or -1.
    """
    weights = np.empty(logits.shape[1], np.float32)
    sums = np.empty(-(-logits.shape[1] // _BLOCK), np.float64)
    for i in range(logits.shape[0]):
        best, sound = _exponentials(logits[i], temperature, weights)
        if not sound:
            return i
        token, total = _invert_cdf(weights, sums, u[i])
        if greedy:
            token = np.argmax(logits[i])
        tokens[i] = token
        logps[i] = (np.float64(logits[i, token]) - best) / temperature - np.log(total)
        if entropies.shape[0]:
            mean = 0.0
            for j in range(logits.shape[1]):
                # A token of no weight may have an infinite logit.
                x = max((logits[i, j] - best) / temperature, _LOWEST)
                mean += np.float64(weights[j]) * np.float64(x)
            entropies[i] = np.log(total) - mean / total
    return -1


# T is float32, or bfloat16 as uint16.
_SIGNATURES = {
    rms_norm: "void(f4[:,::1], T[::1], f4, T[:,::1])",
    accumulate: "void(f4[:,::1], T[:,::1])",
    gate: "void(T[:,:,::1], T[:,::1], T[:,::1])",
    attend: (
        "void(T[:,:,::1], T[::1], T[::1], T[::1], f4, i8, f4[:,:,::1], i8[::1], i8[::1], "
        "i8[:,::1], T[::1], T[::1], T[:,:,::1])"
    ),
}
_DRAW = {draw: "i8(f4[:,::1], f8[::1], f4, b1, i8[::1], f4[::1], f4[::1])"}


@cache
def kernels(dtype: Literal["float32", "bfloat16"] = "float32") -> Any:
    """The compiled functions of this module, by name; compiled or loaded at the first call.

    Args:
        dtype: Of weights, keys and values.
    """
    options = {**_OPTIONS, "nogil": True}
    element = {"float32": "f4", "bfloat16": "u2"}[dtype]
    signatures = {kernel: text.replace("T", element) for kernel, text in _SIGNATURES.items()}
    if dtype == "float32":
        signatures.update(_DRAW)
    sources = [Path(__file__), Path(str(lanes.__file__))]
    return compile_once(signatures, options, sources)
