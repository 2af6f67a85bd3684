import numpy as np
import pytest
import torch
from scipy import stats

from rllib_distrl.engine import SamplingParams
from rllib_distrl.engine.sampling import (
    GOLDEN_GAMMA,
    filter_logits,
    invert_cdf,
    sample,
    splitmix64,
    uniforms,
)

KEYS = [(7, row, sample, 0) for row in range(40) for sample in range(500)]
LOGITS = [2.0, -1.0, 0.5, 0.5, 3.0, -4.0, 1.0, 0.0]


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Renormalised probabilities by loops over a sorted list."""
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    probs = weights / weights.sum()
    ranked = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    ranked = ranked[: top_k or None]
    mass = sum(probs[token] for token in ranked)
    kept, total = [], 0.0
    for token in ranked:
        if total >= top_p * mass:
            break
        kept.append(token)
        total += probs[token]
    return np.array([probs[t] / total if t in kept else 0.0 for t in range(len(probs))])


def test_the_hash_is_splitmix64():
    # The first outputs of the published generator from state 0.
    states = np.arange(1, 4, dtype=np.uint64) * GOLDEN_GAMMA
    assert [hex(x) for x in splitmix64(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_uniforms_do_not_depend_on_the_batch():
    whole = uniforms(KEYS[:50], 20)
    assert whole.dtype == np.float64
    assert np.array_equal(uniforms(KEYS[49::-1], 20), whole[::-1])
    assert np.array_equal(uniforms(KEYS[17:18], 9), whole[17:18, :9])


def test_every_part_of_the_key_and_the_position_matter():
    base = (1, 2, 3, 4)
    keys = [base] + [tuple(v + (i == j) for j, v in enumerate(base)) for i in range(4)]
    keys += [(2, 1, 3, 4), (1, 2, 4, 3), (-1, 2, 3, 4), (2**63 + 5, 2, 3, 4)]
    values = uniforms(keys, 50)
    assert len(np.unique(values)) == values.size


def test_uniforms_are_uniform_and_uncorrelated():
    values = uniforms(KEYS, 4)
    assert values.min() >= 0.0 and values.max() < 1.0
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(values.T) - np.eye(4)
    assert np.abs(correlation).max() < 4.0 / np.sqrt(len(KEYS))
    neighbours = values[:-1, 0] - values[1:, 0]
    assert neighbours.std() == pytest.approx(np.sqrt(1 / 6), rel=0.02)


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (0.999999, 4)]
)
def test_the_cdf_is_inverted_in_vocabulary_order(u, token):
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    assert invert_cdf(probs, torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("vocab", [1024, 1500, 4096])
def test_blocked_and_plain_cdf_agree(vocab):
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.softmax(3 * torch.randn(300, vocab, generator=generator), -1)
    probs[:, ::3] = 0.0
    u = torch.from_numpy(uniforms(KEYS[:300], 1)[:, 0])
    u[0], u[1] = 0.0, 1.0 - 2.0**-48
    cumulative = probs.double().cumsum(-1)
    plain = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    got = invert_cdf(probs, u)
    assert (probs.gather(-1, got[:, None]) > 0).all()
    # Different summation orders may disagree at a boundary, on neighbours only.
    assert (got == plain).float().mean() > 0.98
    reached = cumulative.gather(-1, got[:, None])[:, 0] / cumulative[:, -1]
    assert (reached - u > -1e-6).all()


@pytest.mark.parametrize("vocab", [61, 1500])
def test_probabilities_that_are_not_numbers_stay_in_the_vocabulary(vocab):
    probs = torch.full((3, vocab), 1 / vocab)
    probs[1] = torch.nan
    u = torch.tensor([0.0, 0.5, 1.0 - 2.0**-48], dtype=torch.float64)
    assert invert_cdf(probs, u).tolist() == [0, vocab - 1, vocab - 1]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (3, 1.0), (4, 1.0), (0, 0.9), (0, 0.05), (5, 0.8), (99, 0.6)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_and_logps_follow_the_renormalised_softmax(temperature, top_k, top_p):
    expected = oracle(LOGITS, temperature, top_k, top_p)
    params = SamplingParams(1, temperature, top_p, top_k, entropy=True)
    u = torch.from_numpy(uniforms(KEYS, 1)[:, 0])
    tokens, logps, entropies = sample(torch.tensor([LOGITS] * len(u)), u, params)
    counts = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    support = expected > 0
    assert not counts[~support].any()
    if support.sum() > 1:
        assert stats.chisquare(counts[support], expected[support] * len(u)).pvalue > 1e-3
    np.testing.assert_allclose(logps, np.log(expected[tokens]), atol=2e-6)
    assert logps.dtype == torch.float32
    entropy = -(expected[support] * np.log(expected[support])).sum()
    np.testing.assert_allclose(entropies, entropy, atol=1e-6)


def test_top_k_keeps_exactly_k_of_equal_logits():
    kept = filter_logits(torch.zeros(1, 6), top_k=4, top_p=1.0)
    assert torch.isfinite(kept).tolist() == [[True] * 4 + [False] * 2]


def test_greedy_takes_the_best_and_reports_the_models_own_logp():
    params = SamplingParams(1, temperature=0.3, top_k=2, greedy=True)
    u = torch.zeros(2, dtype=torch.float64)
    tokens, logps, _ = sample(torch.tensor([LOGITS] * 2), u, params)
    assert tokens.tolist() == [4, 4]
    np.testing.assert_allclose(logps, np.log(oracle(LOGITS)[4]), atol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**{"max_tokens": 4, **bad}).validate()
