"""Packed rows hold every token once, and attention over them is that of the rows."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rllib_distrl.maths.packing import first_of_prompt, pack, packed_attention, split_packed

# Prompts 5 6, 5 6, 7 and 5 6 again; 9 is padding.
IDS = torch.tensor([[5, 6, 1, 2, 3], [5, 6, 4, 9, 9], [7, 1, 2, 9, 9], [5, 6, 9, 9, 9]])
PROMPT_LENS, LENGTHS = torch.tensor([2, 2, 1, 2]), torch.tensor([5, 3, 3, 2])


def test_a_shared_prompt_stands_once():
    assert first_of_prompt(IDS, PROMPT_LENS).tolist() == [0, 0, 2, 0]
    packing = pack(IDS, PROMPT_LENS, LENGTHS)
    assert packing.input_ids.tolist() == [5, 6, 7, 1, 2, 3, 4, 1, 2]
    assert packing.positions.tolist() == [0, 1, 0, 2, 3, 4, 2, 1, 2]
    assert packing.owners.tolist() == [0, 0, 2, 0, 0, 0, 1, 2, 2]
    assert packing.prompt.tolist() == [0, 0, 1, 0]
    assert packing.rows[0].tolist() == [0, 1, 3, 4, 5]
    assert packing.rows[1, :3].tolist() == [0, 1, 6]
    assert packing.rows[2, :3].tolist() == [2, 7, 8]
    assert packing.rows[3, :2].tolist() == [0, 1]
    assert len(packing.places.unique()) == 9


def test_prompts_of_other_lengths_are_other_prompts():
    assert first_of_prompt(IDS, torch.tensor([2, 1, 1, 2])).tolist() == [0, 1, 2, 0]


def ragged(seed=0):
    """Nine rows of three prompts, of which two rows have no completion."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (9, 45), generator=generator)
    ids[1:4, :20] = ids[0, :20]
    ids[5:8, :3] = ids[4, :3]
    prompt_lens = torch.tensor([20, 20, 20, 20, 3, 3, 3, 3, 11])
    return ids, prompt_lens, torch.tensor([20, 45, 21, 33, 4, 3, 20, 9, 40])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_and_its_gradients_are_those_of_the_rows(kv_heads):
    packing = pack(*ragged())
    assert len(packing.input_ids) == 20 + 3 + 11 + int((ragged()[2] - ragged()[1]).sum())
    torch.manual_seed(1)
    inputs = [
        torch.randn(len(packing.input_ids), heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    weights = torch.randn(len(packing.input_ids), 4, 8, dtype=torch.float64)
    found = packed_attention(*inputs, packing, 0.7)
    rows = [x.repeat_interleave(4 // x.shape[1], 1)[packing.rows].transpose(1, 2) for x in inputs]
    scores = rows[0] @ rows[1].mT * 0.7
    scores = scores.masked_fill(torch.ones(45, 45).tril() == 0, -torch.inf)
    expected = (scores.softmax(-1) @ rows[2]).transpose(1, 2)[packing.owners, packing.positions]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    oracle = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(gradients, oracle, rtol=1e-11, atol=1e-12)


def test_gradients_are_numerically_right():
    ids, prompt_lens, lengths = (x[4:] for x in ragged())
    packing = pack(ids[:, :12], prompt_lens, lengths.clamp(max=12))
    torch.manual_seed(2)
    inputs = [
        torch.randn(len(packing.input_ids), heads, 4, dtype=torch.float64, requires_grad=True)
        for heads in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, packing, 0.5), inputs)


def test_no_row_shares_a_prompt():
    ids = torch.arange(24).view(3, 8)
    packing = pack(ids, torch.tensor([3, 3, 3]), torch.tensor([8, 8, 8]))
    assert len(packing.input_ids) == 24
    x = torch.randn(24, 2, 4, dtype=torch.float64)
    found = packed_attention(x, x, x, packing, 0.5)
    rows = x[packing.rows].transpose(1, 2)
    expected = scaled_dot_product_attention(rows, rows, rows, is_causal=True, scale=0.5)
    expected = expected.transpose(1, 2)[packing.owners, packing.positions]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("skewed", [True, False])
def test_what_attention_computes_stays_within_the_budget(whole_rows, skewed):
    """Sizes of a real model: groups of 8, prompts of 50 to 900 tokens, a budget of 16,384."""
    generator = np.random.default_rng(0)
    prompts = torch.arange(48).repeat_interleave(8)
    prompt_lens = torch.tensor(generator.integers(50, 900, 48)).repeat_interleave(8)
    mean = np.where(np.arange(384) % 8 == 0, 4_000, 20) if skewed else np.full(384, 400)
    completions = np.minimum(generator.geometric(1 / mean), 8_000)
    lengths = prompt_lens + torch.tensor(completions)
    parts = split_packed(prompts, prompt_lens, lengths, 16_384, whole_rows=whole_rows)
    assert sorted(torch.cat(parts).tolist()) == list(range(384))
    for part in parts:
        p, n = prompt_lens[part], lengths[part]
        rows = len(part) * int(n.max())
        shared = len(prompts[part].unique()) * int(p.max()) + len(part) * int((n - p).max())
        assert (rows if whole_rows else shared) <= 16_384


def test_micro_batches_count_a_prompt_once_and_keep_its_rows_together():
    prompt = torch.tensor([0, 1, 0, 1, 2])
    prompt_lens = torch.tensor([10, 4, 10, 4, 7])
    lengths = torch.tensor([12, 9, 15, 5, 8])

    def split(budget, **how):
        return [part.tolist() for part in split_packed(prompt, prompt_lens, lengths, budget, **how)]

    # Prompt 0: 10 and two completions of 5 places, 20. Prompts 1 and 2: two of 7 places, and three
    # completions of 5, 29; without row 1 it is 14 and two of 1, 16.
    assert split(29) == [[4, 3, 1], [0, 2]]
    # A group beyond the budget is cut, and its prompt is computed again.
    assert split(28) == [[4, 3], [1], [0, 2]]
    assert split(19) == [[4, 3], [1], [0], [2]]
    # Each row with its prompt: 3 x 9 and 2 x 15.
    assert split(30, whole_rows=True) == [[4, 3, 1], [0, 2]]
    assert split(29, whole_rows=True) == [[4, 3, 1], [0], [2]]
    with pytest.raises(ValueError, match="Set micro_batch_tokens to at least 15"):
        split_packed(prompt, prompt_lens, lengths, 14)
