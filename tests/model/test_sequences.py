import pytest
import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.model.sequences import Sequences, from_incremental_obs


def example() -> Sequences:
    # Prompts of 2 and 3 tokens, completions of 3 and 1 tokens.
    return Sequences(
        input_ids=torch.tensor([[1, 2, 11, 12, 13], [3, 4, 5, 14, 0]]),
        prompt_lens=torch.tensor([2, 3]),
        actions=torch.tensor([[11, 12, 13], [14, 0, 0]]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
    )


def test_states_are_the_positions_before_each_token():
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    states = example().states(hidden)[..., 0]
    assert states[0].tolist() == [1.0, 2.0, 3.0]
    assert states[1, 0].item() == 7.0


def test_lengths_count_prompt_and_completion():
    assert example().lengths.tolist() == [5, 4]


def test_rows_cut_to_the_longest():
    chosen = example().rows(torch.tensor([1]))
    assert chosen.input_ids.tolist() == [[3, 4, 5, 14]]
    assert chosen.actions.tolist() == [[14]]


def incremental_batch() -> dict:
    obs = torch.zeros(2, 4, 5, dtype=torch.long)
    obs[0, 0] = torch.tensor([2, 1, 2, 0, 0])
    obs[1, 0] = torch.tensor([3, 3, 4, 5, 0])
    actions = torch.tensor([[11, 12, 13, 13], [14, 14, 0, 0]])
    return {Columns.OBS: obs, Columns.ACTIONS: actions}


def test_incremental_observations_give_the_same_rows():
    sequences = from_incremental_obs(incremental_batch())
    assert sequences.prompt_lens.tolist() == [2, 3]
    assert sequences.input_ids[0, :6].tolist() == [1, 2, 11, 12, 13, 13]
    assert sequences.input_ids[1].tolist() == [3, 4, 5, 14, 14, 0, 0]


def test_a_cut_episode_is_refused():
    batch = incremental_batch()
    batch[Columns.OBS][1, 0, 0] = 0
    with pytest.raises(ValueError, match="without its prompt"):
        from_incremental_obs(batch)
