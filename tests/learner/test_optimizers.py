import pytest
import torch

from tests.learner.rig import hot_config, make_learner, sample


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


def update(learner, episodes, k):
    return learner.update(
        episodes=episodes,
        timesteps={"training_iteration": k, "num_env_steps_sampled_lifetime": 100 * k},
    )["default_policy"]


def rates(results):
    names = ("default_optimizer_learning_rate", "critic_learning_rate")
    return [tuple(float(result[name].peek()) for name in names) for result in results]


SCHEDULE = {
    "lr": 1e-3,
    "critic_lr": 4e-3,
    "lr_schedule": "cosine",
    "lr_warmup_iterations": 2,
    "lr_decay_iterations": 4,
}


def test_warm_up_and_cosine_move_both_rates(episodes):
    learner = make_learner(hot_config(**SCHEDULE))
    found = rates([update(learner, episodes, k) for k in (1, 2, 3, 4)])
    assert found[:3] == [
        pytest.approx((5e-4, 2e-3)), pytest.approx((1e-3, 4e-3)), pytest.approx((5e-4, 2e-3)),
    ]  # fmt: skip
    assert found[3] == pytest.approx((0.0, 0.0), abs=1e-12)


def test_the_rate_is_that_of_the_step(episodes):
    """Adam's first step moves a parameter by lr, whatever the gradient."""
    learner = make_learner(hot_config(**SCHEDULE, grad_clip=None))
    before = {n: p.clone() for n, p in learner.policy_module.named_parameters()}
    update(learner, episodes, 1)
    moved = {
        n: (p.detach() - before[n].detach()).abs().max()
        for n, p in learner.policy_module.named_parameters()
    }
    assert float(moved["policy.model.norm.weight"]) == pytest.approx(5e-4, rel=1e-2)
    assert float(moved["value_head.weight"]) == pytest.approx(2e-3, rel=1e-2)


def test_resuming_in_the_middle_of_a_schedule_is_exact(episodes):
    straight = make_learner(hot_config(**SCHEDULE))
    update(straight, episodes, 1)
    state = straight.get_state()
    resumed = make_learner(hot_config(**SCHEDULE))
    resumed.set_state(state)
    for k in (2, 3):
        for learner in (straight, resumed):
            update(learner, episodes, k)
    for one, other in zip(
        straight.policy_module.parameters(), resumed.policy_module.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_rllibs_own_schedule_stays_rllibs(episodes):
    learner = make_learner(hot_config(lr=[[0, 1e-3], [200, 0.0]]))
    found = rates([update(learner, episodes, k) for k in (1, 2)])
    assert found == [pytest.approx((5e-4, 5e-4)), pytest.approx((0.0, 0.0))]
