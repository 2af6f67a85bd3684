import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rllib_distrl.engine import SamplingParams
from rllib_distrl.engine.kernels import PAGE, kernels
from rllib_distrl.engine.sampling import draw, sample

NONE = np.zeros(0, np.float32)
EPS = np.float32(1e-5)


def numbers(seed, *size):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def normalised(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("width", [1, 20, 128])
def test_rms_norm(width):
    x, weight = numbers(0, 3, width), numbers(1, width)
    out = np.full_like(x, np.nan)
    kernels().rms_norm(x, weight, EPS, out)
    np.testing.assert_allclose(out, normalised(x.astype(np.float64), weight), rtol=1e-5, atol=1e-6)


def test_gate_from_one_extreme_to_the_other():
    x = np.stack((np.linspace(-200, 200, 4001, dtype=np.float32), numbers(2, 4001)))[None]
    bias, out = numbers(3, 2, 4001), np.full((1, 4001), np.nan, np.float32)
    kernels().gate(np.ascontiguousarray(x), bias, out)
    g, u = x[0].astype(np.float64) + bias
    want = g * np.exp(-np.logaddexp(0.0, -g)) * u
    np.testing.assert_allclose(out[0], want, rtol=2e-6, atol=1e-30)


def attention_by_loops(qkv, norms, heads, angles, positions, rows):
    """Each token's heads on their own, in float64, without pages."""
    kv_heads, width = (qkv.shape[1] - heads) // 2, qkv.shape[2]
    x = qkv.astype(np.float64)
    if norms is not None:
        x[:, :heads] = normalised(x[:, :heads], norms[0])
        x[:, heads : heads + kv_heads] = normalised(x[:, heads : heads + kv_heads], norms[1])
    pairs = x[:, : heads + kv_heads].reshape(len(x), heads + kv_heads, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles[positions])[:, None]
    x[:, : heads + kv_heads] = np.stack((turned.real, turned.imag), -1).reshape(len(x), -1, width)
    out = np.zeros((len(x), heads, width))
    for i in range(len(x)):
        seen = (rows == rows[i]) & (positions <= positions[i])
        for h in range(heads):
            kv = heads + h * kv_heads // heads
            scores = x[seen, kv] @ x[i, h] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ x[seen, kv + kv_heads]
    return out


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 32), (6, 2, 16), (2, 1, 48)])
def test_attention_through_pages_equals_attention_by_loops(heads, kv_heads, width, normed):
    lengths, sequences = [5, 16, 41], 3
    rows = np.repeat(np.arange(sequences), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    qkv = numbers(4, len(rows), heads + 2 * kv_heads, width)
    bias, norms = numbers(5, *qkv.shape[1:]), numbers(6, 2, width) if normed else None
    angles = np.arange(50)[:, None] * 0.7 ** np.arange(width // 2)
    cos, sin = np.repeat(np.cos(angles), 2, 1), np.repeat(np.sin(angles), 2, 1)
    sin[:, ::2] *= -1
    rotations = np.ascontiguousarray(np.stack((cos, sin), 1), np.float32)
    tables = np.random.default_rng(7).permutation(12).reshape(3, 4)
    # What pages held before must not matter.
    keys = np.full(12 * kv_heads * width * PAGE, np.nan, np.float32)
    values, out = keys.copy(), np.full((len(rows), heads, width), np.nan, np.float32)
    want = attention_by_loops(qkv + bias, norms, heads, angles, positions, rows)
    # Prompts first, many tokens of a sequence at once; then the last tokens, one of each.
    last = np.cumsum(lengths) - 1
    for part in (np.setdiff1d(np.arange(len(rows)), last), last):
        got = np.ascontiguousarray(out[part])
        kernels().attend(
            qkv[part],
            bias.reshape(-1),
            *((NONE, NONE) if norms is None else norms),
            EPS,
            heads,
            rotations,
            positions[part],
            rows[part],
            tables,
            keys,
            values,
            got,
        )
        np.testing.assert_allclose(got, want[part], rtol=1e-5, atol=1e-5)


def bits(tensor):
    """bfloat16 as NumPy and the kernels know it."""
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    # From 30 on SiLU(g) is g: what is left is the product of two numbers of 8 bits each.
    g = torch.arange(32, 288).repeat_interleave(256).bfloat16().view(1, -1)
    u = (torch.arange(128, 384).repeat(256) / 64 * (-1.0) ** torch.arange(1 << 16)).bfloat16()
    x, out = torch.stack((g, u.view(1, -1)), 1), torch.empty(1, 1 << 16, dtype=torch.bfloat16)
    zeros = np.zeros((2, 1 << 16), np.uint16)
    kernels("bfloat16").gate(bits(x), zeros, out.view(torch.uint16).numpy())
    assert torch.equal(out, (g.float() * u.float()).bfloat16())
    # A first token attends to its own value alone: projection and bias, rounded once.
    value, bias = torch.from_numpy(numbers(8, 500, 1, 16)), torch.from_numpy(numbers(9, 16))
    qkv = torch.cat((torch.zeros(500, 2, 16), value), 1)
    biases = torch.cat((torch.zeros(32), bias))
    out = torch.empty(500, 1, 16, dtype=torch.bfloat16)
    still = np.zeros((1, 2, 16), np.float32)
    rows, none = np.arange(500), np.zeros(0, np.uint16)
    cache = [np.zeros(500 * 16 * PAGE, np.uint16) for _ in range(2)]
    kernels("bfloat16").attend(
        bits(qkv), bits(biases), none, none, EPS, 1, still, 0 * rows, rows, rows[:, None],
        *cache, out.view(torch.uint16).numpy(),
    )  # fmt: skip
    assert torch.equal(out, (value.bfloat16().float() + bias.bfloat16().float()).bfloat16())


def test_bfloat16_is_widened_exactly():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = every[every.isfinite()].view(1, -1)
    x = torch.zeros(finite.shape)
    kernels("bfloat16").accumulate(x.numpy(), bits(finite))
    assert torch.equal(x, finite.float())


@pytest.mark.parametrize("vocab", [5, 64, 1500])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_compiled_draw_equals_the_plain_one(vocab, greedy):
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(500, vocab, generator=generator)
    logits[:, ::3] = -torch.inf
    u = torch.rand(500, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0.0, 1.0 - 2.0**-48
    params = SamplingParams(1, temperature=0.7, greedy=greedy, entropy=True)
    tokens, logps, entropies = sample(logits.clone(), u, params)
    want_tokens, want_logps, want_entropies = draw(logits, u, params)
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
    # Other summation orders may disagree on neighbours where u falls on their boundary.
    same = tokens == want_tokens
    assert same.all() if greedy else same.float().mean() > 0.98
    torch.testing.assert_close(logps[same], want_logps[same], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(entropies, want_entropies, atol=5e-6, rtol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_of_diverged_weights_are_an_error(bad):
    logits = torch.zeros(3, 70)
    logits[2, 66] = bad
    with pytest.raises(RuntimeError, match="row 2 are not finite"):
        sample(logits, torch.zeros(3, dtype=torch.float64), SamplingParams(1))


def test_a_cache_that_cannot_be_written_to_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "rllib_distrl").write_text("not a folder")
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be written to.*Set DISTRL_CACHE"):
        kernels.__wrapped__()


NORMALISE = """
import numpy as np
from rllib_distrl.engine.kernels import kernels
x = np.random.default_rng(0).standard_normal((7, 48)).astype(np.float32)
out = np.empty_like(x)
kernels().rms_norm(x, x[0], np.float32(1e-5), out)
print(out.tobytes().hex())
"""


@pytest.mark.slow
def test_one_of_many_processes_compiles_and_all_compute_the_same_bits(tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, "-c", NORMALISE],
            env={**os.environ, "DISTRL_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ended = [process.communicate() for process in (start(), start())]
    ended.append(start().communicate())
    assert sorted("Compiling" in said for _, said in ended) == [False, False, True]
    results = {computed for computed, _ in ended}
    assert len(results) == 1, [said for _, said in ended]
    assert len(results.pop()) == 2 * 4 * 7 * 48 + 1
