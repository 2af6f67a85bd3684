import numpy as np
import pytest

from rllib_distrl.method.prompt_samplers import PromptRequest, PromptResult
from rllib_distrl.method.registry import names, resolve


def make(spec, n_rows, seed=0):
    return resolve("prompt_sampler", spec)(n_rows, seed)


def rows(requests):
    return [request.row for request in requests]


def result(row, correct, of, visit=0):
    statuses = ("correct",) * correct + ("wrong",) * (of - correct)
    return PromptResult(PromptRequest(row, visit), tuple(map(float, range(of))), statuses)


def test_every_row_once_per_epoch_in_a_new_order():
    sampler = make("without_replacement", 5)
    served = sampler.next(15)
    epochs = [rows(served[i : i + 5]) for i in (0, 5, 10)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [request.visit for request in served] == [0] * 5 + [1] * 5 + [2] * 5


def test_generators_are_served_in_order():
    sampler = make("without_replacement", 2**31 - 1)
    assert rows(sampler.next(3)) + rows(sampler.next(2)) == [0, 1, 2, 3, 4]


def test_uniform_draws_every_row_equally_often():
    sampler = make("uniform", 4)
    served = [request for _ in range(40) for request in sampler.next(50)]
    counts = np.bincount(rows(served), minlength=4)
    # 2,000 draws of 1/4: mean 500, standard deviation 19.4.
    assert np.abs(counts - 500).max() < 4 * 19.4
    assert len(set(served)) == 2_000
    assert any(a == b for a, b in zip(rows(served), rows(served)[1:], strict=False))


def test_the_weight_of_a_row_is_the_variance_of_its_pass_rate():
    sampler = make("variance_mix", 4)
    assert sampler.weights.tolist() == [0.25] * 4
    # p = (2 + 1) / (8 + 2) = 3/10, and (0 + 1) / (8 + 2) = 1/10.
    sampler.update([result(1, correct=2, of=8), result(3, correct=0, of=8)])
    np.testing.assert_allclose(sampler.weights, [0.25, 0.21, 0.25, 0.09])
    # Half of 2 of 8, and 8 of 8: p = (1 + 8 + 1) / (4 + 8 + 2) = 5/7.
    sampler.update([result(1, correct=8, of=8, visit=1)])
    np.testing.assert_allclose(sampler.weights, [0.25, 10 / 49, 0.25, 0.09])
    # A row that is served twice at once is decayed once: (0 + 1 + 3 + 1) / (4 + 4 + 4 + 2).
    sampler.update([result(3, correct=1, of=4, visit=2), result(3, correct=3, of=4, visit=3)])
    assert sampler.weights[3] == pytest.approx(5 / 14 * 9 / 14)


def test_prompts_are_drawn_by_variance_and_evenly_half_and_half():
    sampler = make({"name": "variance_mix", "share": 0.6, "decay": 0.0}, 4)
    sampler.update([result(row, correct=98, of=98) for row in (0, 1)] + [result(2, 49, 98)])
    weights = np.array([99 / 1e4, 99 / 1e4, 0.25, 0.25])
    np.testing.assert_allclose(sampler.weights, weights)
    drawn, even = [], []
    for _ in range(500):
        served = rows(sampler.next(10))
        drawn += served[:6]
        even += served[6:]
    assert np.bincount(even).tolist() == [500] * 4
    expected = 3_000 * weights / weights.sum()
    spread = np.sqrt(expected * (1 - expected / 3_000))
    assert (np.abs(np.bincount(drawn, minlength=4) - expected) < 4 * spread).all()


def test_visits_tell_the_times_apart_at_which_a_row_is_served():
    sampler = make("variance_mix", 3)
    served = [request for _ in range(5) for request in sampler.next(8)]
    assert len(set(served)) == 40


def test_a_pool_makes_a_generator_a_data_set():
    with pytest.raises(ValueError, match=r"2,147,483,647.*pool"):
        make("variance_mix", 2**31 - 1)
    sampler = make({"name": "variance_mix", "pool": 6}, 2**31 - 1)
    assert set(rows(sampler.next(100))) == set(range(6))


@pytest.mark.parametrize("name", names("prompt_sampler"))
def test_state_continues_in_the_middle(name):
    one, other = make(name, 7, seed=3), make(name, 7, seed=3)
    one.next(10)
    one.update([result(2, correct=1, of=4)])
    other.set_state(one.get_state())
    one.update([result(5, correct=4, of=4)])
    other.update([result(5, correct=4, of=4)])
    assert one.next(9) == other.next(9)
    assert one.next(9) != other.next(8)


@pytest.mark.parametrize(("before", "now"), [(7, 6), (6, 7)])
def test_counts_of_other_rows_are_refused(before, now):
    """As when max_prompt_tokens leaves out more rows than before."""
    old, new = make("variance_mix", before), make("variance_mix", now)
    old.update([result(before - 1, correct=1, of=4)])
    with pytest.raises(ValueError, match=f"counts of {before} rows and the task now serves {now}"):
        new.set_state(old.get_state())
    assert rows(new.next(4)) == rows(make("variance_mix", now).next(4))


@pytest.mark.parametrize("name", ["uniform", "without_replacement"])
@pytest.mark.parametrize("now", [4, 9])
def test_a_cursor_goes_on_over_other_rows(name, now):
    old, new = make(name, 7), make(name, now)
    old.next(10)
    new.set_state(old.get_state())
    served = new.next(3 * now)
    assert set(rows(served)) <= set(range(now))
    assert len(set(served)) == 3 * now


@pytest.mark.parametrize(
    ("before", "now"), [("uniform", "variance_mix"), ("variance_mix", "uniform")]
)
def test_the_state_of_another_sampler_is_refused(before, now):
    with pytest.raises(ValueError, match="it is another prompt_sampler's"):
        make(now, 7).set_state(make(before, 7).get_state())


@pytest.mark.parametrize("name", names("prompt_sampler"))
def test_seeds_differ(name):
    orders = {tuple(rows(make(name, 20, seed).next(20))) for seed in range(3)}
    assert len(orders) == 3


@pytest.mark.parametrize("bad", [{"share": 0.0}, {"share": 1.5}, {"decay": -0.1}, {"pool": 0}])
def test_settings_out_of_bounds_are_refused(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}={next(iter(bad.values()))}"):
        make({"name": "variance_mix", **bad}, 5)


def test_thompson_counts_fade_and_add_up():
    sampler = make({"name": "beta_thompson", "decay": 0.5, "fading": 0.8}, 3)
    sampler.update([result(1, correct=2, of=8)])
    # Then both rows fade by .8, and row 1 by another half: 1 + .4 · 2 + 3, 1 + .4 · 6 + 1.
    sampler.update([result(1, correct=3, of=4, visit=1)])
    for found, expected in zip(sampler.beta, ([1, 4.8, 1], [1, 4.4, 1]), strict=True):
        np.testing.assert_allclose(found, expected)


def test_thompson_serves_what_is_open_and_tries_what_is_unknown():
    sampler = make({"name": "beta_thompson", "fading": 1.0, "decay": 1.0}, 40)
    sampler.update([result(row, correct=0, of=400) for row in range(10)])
    sampler.update([result(row, correct=400, of=400) for row in range(10, 20)])
    sampler.update([result(row, correct=200, of=400) for row in range(20, 30)])
    counts = np.bincount([row for _ in range(200) for row in rows(sampler.next(10))], minlength=40)
    # p̃(1 − p̃) of hopeless and solved rows is at most .01; an unknown row's exceeds that of an
    # open one, .25 less a few thousandths, about as often as it falls below.
    assert counts[:20].sum() == 0
    assert counts[20:30].min() > 50 and counts[30:].min() > 5
    assert len(set(rows(sampler.next(40)))) == 40


def test_beta_counts_decay_towards_the_latest_visits():
    sampler = make({"name": "beta_counts", "decay": 0.5, "prior": 2.0, "floor": 0.1}, 3)
    sampler.update([result(1, correct=3, of=4)])
    # a = 2/2 + 3, b = 2/2 + 1; then half of these, and 0 of 4.
    v = 4 / 6
    expected = [0.6, 0.1 + (v * (1 - v)) ** 0.5, 0.6]
    np.testing.assert_allclose(sampler.weights, expected)
    sampler.update([result(1, correct=0, of=4, visit=1)])
    v = 2 / (2 + 1 + 4)
    np.testing.assert_allclose(sampler.weights[1], 0.1 + (v * (1 - v)) ** 0.5)


def test_beta_counts_draw_by_weight_and_no_row_twice_before_all_were_served():
    sampler = make({"name": "beta_counts", "decay": 0.0, "floor": 0.1}, 4)
    sampler.update([result(row, correct=4, of=4) for row in (0, 1)])  # weights .1 .1 .6 .6
    counts = np.bincount([rows(sampler.next(1))[0] for _ in range(2_000)], minlength=4)
    expected = 2_000 * np.array([0.1, 0.1, 0.6, 0.6]) / 1.4
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()
    assert sorted(rows(sampler.next(4))) == [0, 1, 2, 3]
    assert np.bincount(rows(sampler.next(9))).min() == 2
    with pytest.raises(ValueError, match="floor=0"):
        make({"name": "beta_counts", "floor": 0.0}, 4)


def graded(row, *returns):
    return PromptResult(PromptRequest(row, 0), returns, ("graded",) * len(returns))


def test_the_share_of_a_source_is_by_its_advantages_and_how_often_it_was_tried():
    sampler = make({"name": "ucb_source", "sources": [2, 3], "window": 4, "temperature": 0.5}, 5)
    np.testing.assert_allclose(sampler.shares, [0.5, 0.5])
    sampler.update([graded(1, 1.0, 0.0), graded(4, 1.0, 1.0, 1.0, 1.0)])
    # |A| of the first: ½ over the sample std √½; of the second 0. 2 and 4 completions of 6.
    gain = 0.5 / (0.5**0.5 + 1e-6)
    scores = [gain + (2 * np.log(7) / 3) ** 0.5, (2 * np.log(7) / 5) ** 0.5]
    raised = np.exp(np.array(scores) / 0.5)
    np.testing.assert_allclose(sampler.shares, raised / raised.sum())
    sampler.update([graded(0, 1.0, 1.0, 1.0, 1.0)])  # the last four count: none of the gain
    scores = [(2 * np.log(11) / 7) ** 0.5, (2 * np.log(11) / 5) ** 0.5]
    raised = np.exp(np.array(scores) / 0.5)
    np.testing.assert_allclose(sampler.shares, raised / raised.sum())


def test_sources_are_served_by_their_shares_each_without_replacement():
    sampler = make({"name": "ucb_source", "sources": [4, 2], "temperature": 10.0}, 6)
    served = rows(sampler.next(600))
    counts = np.bincount(served, minlength=6)
    assert abs(counts[:4].sum() - 300) < 4 * 600**0.5 / 2
    assert np.ptp(counts[:4]) <= 1 and np.ptp(counts[4:]) <= 1


@pytest.mark.parametrize("sources", [[3, 3], [2, 2], 9])
def test_sources_that_are_not_the_tasks_rows_are_refused(sources):
    sampler = make({"name": "ucb_source", "sources": sources}, 5)
    with pytest.raises(ValueError, match=r"the task serves 5 rows"):
        sampler.next(1)
    with pytest.raises(ValueError, match="two or more sources"):
        make({"name": "ucb_source", "sources": [5]}, 5)
    with pytest.raises(ValueError, match="has 2 sources, and there are 3 now"):
        make({"name": "ucb_source", "sources": 3}, 5).set_state(make("ucb_source", 5).get_state())
