import numpy as np
import pytest
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_distrl.learner.connector import GROUPS, SequencesFromEpisodes
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS, REPLY_TOKENS


def episode(prompt, tokens, rewards, row, *, terminated=True):
    steps = len(tokens)
    return SingleAgentEpisode(
        observations=np.array([prompt[-1], *tokens]),
        actions=np.array(tokens),
        rewards=np.array(rewards, dtype=np.float32),
        infos=[{"prompt_ids": prompt, "row": row, "visit": 0}, *[{}] * steps],
        terminated=terminated,
        extra_model_outputs={Columns.ACTION_LOGP: np.array([-0.5] * steps, dtype=np.float32)},
        len_lookback_buffer=0,
    )


def connect(episodes):
    connector = SequencesFromEpisodes(None, None)
    return connector(rl_module=None, batch={}, episodes=episodes)[DEFAULT_MODULE_ID]


def test_columns_by_hand():
    batch = connect(
        [
            episode([1, 2, 3], [7, 8], [0.0, 1.0], row=5),
            episode([4], [9, 6, 5], [0.0, 0.0, 0.5], row=9),
            episode([1, 2, 3], [8], [0.0], row=5),
        ]
    )
    assert batch[INPUT_IDS].tolist() == [[1, 2, 3, 7, 8], [4, 9, 6, 5, 0], [1, 2, 3, 8, 0]]
    assert batch[PROMPT_LENS].tolist() == [3, 1, 3]
    assert batch[Columns.ACTIONS].tolist() == [[7, 8, 0], [9, 6, 5], [8, 0, 0]]
    assert batch[Columns.REWARDS].tolist() == [[0, 1, 0], [0, 0, 0.5], [0, 0, 0]]
    assert batch[Columns.LOSS_MASK].sum(-1).tolist() == [2, 3, 1]
    assert batch[Columns.ACTION_LOGP][0].tolist() == [-0.5, -0.5, 0.0]
    assert batch[GROUPS].tolist() == [0, 1, 0]


def test_replies_stand_among_the_sampled_tokens():
    first = episode([1, 2], [7, 8, 9], [0.0, 0.5, 1.0], row=5)
    first.infos[0]["replies"] = ((1, (21, 22)), (2, (23,)))
    batch = connect([first, episode([4], [6], [1.0], row=6)])
    assert batch[INPUT_IDS].tolist() == [[1, 2, 7, 21, 22, 8, 23, 9], [4, 6] + [0] * 6]
    assert batch[Columns.ACTIONS].tolist() == [[7, 8, 9], [6, 0, 0]]
    assert batch[REPLY_TOKENS].tolist() == [[0, 2, 3], [0, 0, 0]]
    assert batch[Columns.LOSS_MASK].sum(-1).tolist() == [3, 1]
    assert batch[Columns.REWARDS][0].tolist() == [0.0, 0.5, 1.0]


def test_unfinished_episodes_are_refused():
    with pytest.raises(ValueError, match="cut or has no prompt"):
        connect([episode([1], [2], [0.0], row=0, terminated=False)])


def test_no_episodes_are_refused():
    with pytest.raises(ValueError, match="empty list"):
        connect([])
