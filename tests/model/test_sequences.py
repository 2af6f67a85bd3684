import pytest
import torch
from ray.rllib.core.columns import Columns

from rllib_distrl.model.sequences import Sequences, from_incremental_obs


def example() -> Sequences:
    # Prompts of 2 and 3 tokens, completions of 3 and 1 tokens, no replies.
    return Sequences(
        input_ids=torch.tensor([[1, 2, 11, 12, 13], [3, 4, 5, 14, 0]]),
        prompt_lens=torch.tensor([2, 3]),
        actions=torch.tensor([[11, 12, 13], [14, 0, 0]]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        reply_tokens=torch.zeros(2, 3, dtype=torch.long),
    )


def replied() -> Sequences:
    # 11 12 are answered with 7 8 9, then 13 with 6, then comes 14. The second row has no reply.
    return Sequences(
        input_ids=torch.tensor([[1, 2, 11, 12, 7, 8, 9, 13, 6, 14], [3, 4, 5, 15] + [0] * 6]),
        prompt_lens=torch.tensor([2, 3]),
        actions=torch.tensor([[11, 12, 13, 14], [15, 0, 0, 0]]),
        mask=torch.tensor([[True] * 4, [True] + [False] * 3]),
        reply_tokens=torch.tensor([[0, 0, 3, 4], [0, 0, 0, 0]]),
    )


def test_states_pass_over_replies():
    sequences = replied()
    states = sequences.states(torch.arange(20.0).reshape(2, 10, 1))[..., 0]
    # Before 13 comes the place of 9, before 14 that of 6.
    assert states[0].tolist() == [1.0, 2.0, 6.0, 8.0]
    assert states[1, 0].item() == 12.0
    packed = sequences.packing.input_ids[sequences.packed_states]
    assert packed[0].tolist() == [2, 11, 9, 6]
    assert packed[1, 0].item() == 5


def test_rows_with_replies_are_cut_to_the_longest():
    assert replied().lengths.tolist() == [10, 4]
    assert replied().rows(torch.tensor([1])).input_ids.tolist() == [[3, 4, 5, 15]]
    assert replied().rows(torch.tensor([1, 0])).reply_tokens.tolist() == [[0] * 4, [0, 0, 3, 4]]


def test_incremental_observations_hold_replies():
    obs = torch.zeros(2, 5, 6, dtype=torch.long)
    obs[0, 0, :3] = torch.tensor([2, 1, 2])
    obs[0, 1, :2] = torch.tensor([1, 11])
    obs[0, 2, :5] = torch.tensor([4, 12, 7, 8, 9])
    obs[0, 3, :3] = torch.tensor([2, 13, 6])
    obs[0, 4, :2] = torch.tensor([1, 14])
    obs[1, 0, :4] = torch.tensor([3, 3, 4, 5])
    obs[1, 1, :2] = torch.tensor([1, 15])
    # RLlib's GAE connector adds a step; the second episode is shorter.
    actions = torch.tensor([[11, 12, 13, 14, 0], [15, 0, 0, 0, 0]])
    sequences = from_incremental_obs({Columns.OBS: obs, Columns.ACTIONS: actions})
    assert sequences.input_ids[0].tolist() == [1, 2, 11, 12, 7, 8, 9, 13, 6, 14, 0]
    assert sequences.input_ids[1, :4].tolist() == [3, 4, 5, 15]
    assert sequences.reply_tokens.tolist() == [[0, 0, 3, 4, 4], [0] * 5]


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
