import itertools

import numpy as np
import pytest
import torch

from rllib_distrl.maths.packing import split_by_token_budget


def test_rows_are_grouped_by_length_within_the_budget():
    lengths = torch.tensor([70, 20, 60, 20, 60])
    groups = [group.tolist() for group in split_by_token_budget(lengths, budget=128)]
    # Sorted: 20 20 60 60 70; a micro-batch costs 2. Apart, 20 + 20 + 60 + 60 + 70 and 10; the
    # pairs pad nothing, 70 + 60 would exceed the budget.
    assert groups == [[1, 3], [2, 4], [0]]


def test_padding_is_accepted_where_a_micro_batch_costs_more():
    # 64 a piece: 100 + 110 in one micro-batch pads 10; 100 + 200 would pad 100.
    groups = split_by_token_budget(torch.tensor([110, 200, 100]), budget=4096)
    assert [group.tolist() for group in groups] == [[2, 0], [1]]


def test_the_cuts_are_the_best_of_all():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(1, 60, 8)
        budget = int(generator.integers(60, 400))
        ordered = np.sort(lengths)

        def cost(cuts, ordered=ordered, budget=budget):
            parts = [ordered[a:b] for a, b in itertools.pairwise((0, *cuts, 8))]
            tokens = [len(part) * part.max() for part in parts]
            return sum(tokens) + len(parts) * budget / 64 if max(tokens) <= budget else np.inf

        best = min(cost(c) for n in range(8) for c in itertools.combinations(range(1, 8), n))
        groups = split_by_token_budget(torch.tensor(lengths), budget)
        assert cost(np.cumsum([len(g) for g in groups])[:-1]) == pytest.approx(best)


def test_every_row_is_there_once():
    lengths = torch.randint(1, 50, (100,), generator=torch.Generator().manual_seed(0))
    groups = split_by_token_budget(lengths, budget=64)
    assert sorted(torch.cat(groups).tolist()) == list(range(100))
    assert all(len(group) * int(lengths[group].max()) <= 64 for group in groups)


@pytest.mark.parametrize("budget", [4096, 16384])
@pytest.mark.parametrize("mean", [50, 150, 400])
def test_padding_stays_below_a_tenth_on_natural_lengths(mean, budget):
    """Prompts of 40 to 120 tokens; completions that end at random, or log-normal ones."""
    generator = np.random.default_rng(mean)
    rows = 4 * budget // mean
    prompts = generator.integers(40, 120, rows)
    geometric = np.minimum(generator.geometric(1 / mean, rows), 4 * mean)
    log_normal = np.minimum(generator.lognormal(np.log(mean), 0.8, rows), 2048).astype(int) + 1
    for completions in (geometric, log_normal):
        lengths = torch.tensor(prompts + completions)
        groups = split_by_token_budget(lengths, budget)
        padded = sum(len(group) * int(lengths[group].max()) for group in groups)
        assert 1 - int(lengths.sum()) / padded < 0.1


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="micro_batch_tokens to at least 9"):
        split_by_token_budget(torch.tensor([3, 9]), budget=8)
