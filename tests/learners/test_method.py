import pytest
import torch

from rllib_distrl.learners.method import Method
from rllib_distrl.stages.batch import SequenceBatch
from tests.helpers import distrl_config


def test_the_bounds_of_the_ratio_reach_the_loss():
    config = distrl_config(clip_param=0.1, clip_param_high=0.3, dual_clip=2.0)
    batch = SequenceBatch(
        rewards=torch.zeros(1, 4),
        loss_mask=torch.ones(1, 4, dtype=torch.bool),
        action_logp=torch.zeros(1, 4),
        group=torch.zeros(1, dtype=torch.long),
        advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
    )
    logp = torch.tensor([[1.5, 0.5, 0.5, 9.0]]).log()
    losses = Method.from_config(config).policy_loss(logp, batch)
    assert losses[0].tolist() == pytest.approx([-1.3, -0.5, 0.9, 2.0])
