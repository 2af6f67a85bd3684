"""No setting is dropped in silence: it changes what is computed, or it is refused."""

import inspect

import pytest
import torch

from rllib_distrl import DistRLConfig
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.learner.step import critic_loss, distrl_losses
from rllib_distrl.maths.losses import token_weights
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.method.registry import logp_at, names
from rllib_distrl.settings import TrainingSettings
from tests.helpers import distrl_config

# A value of each setting of the method's maths that differs from the default.
MATHS = {
    "gamma": 0.9, "lambda_": 0.5, "clip_param": 0.1, "clip_param_high": 0.4, "dual_clip": 1.05,
    "vf_loss_coeff": 0.5, "vf_clip_param": 0.01, "entropy_coeff": 0.1,
    "aggregation": "sequence_sum", "head": {"name": "categorical", "low": -20.0, "high": 20.0},
    "n_quantiles": 8, "quantile_huber_kappa": 0.5,
    "quantile_loss": "matched", "target": "mixture", "critic_lambda": 0.5,
    "read_out": {"name": "cvar"}, "bonus_coeff": 1.0, "bonus_stat": "std", "bonus_at": "current",
    "bonus_center": False, "bonus_schedule": "constant", "bonus_horizon": 7,
    "bonus_max_ratio": 0.01,
}  # fmt: skip
# Settings of the learner and the module around it, with a configuration that does not read them.
ELSEWHERE = {
    "critic_lr": (1e-2, {"critic": "none"}),
    "critic_epochs": (2, {"critic": "none"}),
    "critic_freeze": ("attention", {"critic": "shared"}),
    "critic_warmup_iterations": (3, {"critic": "none"}),
    "critic_pretraining": ({"rollouts": 64}, {"critic": "none"}),
    "critic_observation": ("state", {"critic": "none"}),
    "critic_checkpoint": ("folder", {"critic": "shared"}),
    "init_value": (0.5, {"critic": "none"}),
    "init_spread": (0.3, {"n_quantiles": 1}),
    "head_center": ("median", {"n_quantiles": 1}),
    "ensemble": ({"size": 4}, {}),
    "distance": ({"features": 64}, {}),
    "importance_bound": (3.0, {}),
    "lr_decay_iterations": (9, {}),
    "lr_min_ratio": (0.1, {}),
    "grad_clip_by": ("value", {"grad_clip": None}),
    "train_batch_size": (64, {}),
    "train_batch_size_per_learner": (64, {}),
}
# At critic_lambda 1 all targets are the observed return.
OF_TARGETS = {
    "target": ("sample_replacement", {}),
    "quantile_loss": ("matched", {"target": "monte_carlo"}),
}
# Read whatever is chosen, or refused by checks of their own.
ALWAYS = {
    "importance_correction", "micro_batch_tokens", "max_nonfinite_steps", "max_sampling_rounds",
    "precision", "activation_checkpointing", "sharding", "lr_schedule", "lr_warmup_iterations",
    "critic",
    "whiten_advantages", "reward_transforms", "advantage", "shapers", "policy_loss",
    "regularisers", "controllers", "prompt_sampler", "allocator", "branching",
}  # fmt: skip
PLACES = {
    "reward": "reward_transforms", "shaper": "shapers", "regulariser": "regularisers",
    "advantage": "advantage", "policy_loss": "policy_loss",
}  # fmt: skip
# What some stages need around them; a new one that needs nothing is tried as it is.
AROUND = {
    "zero": {"bonus_max_ratio": None},
    "opo": {"whiten_advantages": False},
    "maxk": {"whiten_advantages": False},
    "bnpo": {"whiten_advantages": False},
    "noise_forward": {"whiten_advantages": False},
    "gspo": {"aggregation": "sequence_mean"},
    "sapo": {"aggregation": "sequence_mean"},
    "gmpo": {"aggregation": "sequence_mean"},
    "lad": {"aggregation": "sequence_mean", "whiten_advantages": False},
    "dltv": {"bonus_coeff": 0.0},
    "srft": {"advantage": {"name": "zero"}, "bonus_coeff": 0.0},
    "max_min_groups": {
        "reward_transforms": [{"name": "overlong", "cache_tokens": 4}, {"name": "max_min_groups"}]
    },
    "gdpo": {"reward_transforms": [{"name": "overlong", "cache_tokens": 4}]},
}
OWN = {
    "maxk": {"k": 1},
    "noise_backward": {"false_positive_rate": 0.1, "false_negative_rate": 0.1},
    "noise_forward": {"false_negative_rate": 0.1},
    "macro_gae": {"span": 2},  # rows here have five tokens at most
    "dltv": {"bonus_coeff": 2.0},
}
BINARY = {"entropy_credit_token", "entropy_credit_seq"}  # they refuse other returns
WITHOUT_CRITIC = {"critic": "none", "bonus_coeff": 0.0}
STAGES = [(kind, name) for kind in PLACES for name in names(kind)]
CASES = [(*stage, critic) for stage in STAGES for critic in (True, False)]
CASES.remove(("advantage", "zero", False))  # there is nothing left to change


def settings_with(kind, name, *, critic):
    spec = {"name": name, **OWN.get(name, {})}
    settings = {PLACES[kind]: spec if kind in ("advantage", "policy_loss") else [spec]}
    if not critic:
        settings |= {"advantage": {"name": "reinforce_pp"}, **WITHOUT_CRITIC, **settings}
        if name in ("best_of_k", "pass_at_k"):
            settings[PLACES[kind]] = {**spec, "source": "returns"}
            if kind == "shaper":
                settings[PLACES[kind]] = [settings[PLACES[kind]]]
    return {**settings, **AROUND.get(name, {})}


def refusal(settings):
    try:
        distrl_config(generations=4, prompts=2, **settings).validate()
    except ValueError as error:
        return str(error)
    return None


def outcome(settings):
    """Everything that stages, targets and losses make of one batch, in one row."""
    config = distrl_config(generations=4, prompts=4, **settings)
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 4, 4, 2, 3, 5] * 2)
    mask = torch.arange(5) < lengths.unsqueeze(1)
    rewards = torch.zeros(16, 5, dtype=torch.float64)
    rewards[torch.arange(16), lengths - 1] = torch.rand(16, generator=g, dtype=torch.float64)
    if config.advantage["name"] in BINARY:
        rewards = rewards.round()

    def noise(*shape):
        return torch.randn(16, 5, *shape, generator=g, dtype=torch.float64)

    method = Method.from_config(config)
    action_logp, entropy, ref_logp, moved = noise(), noise().abs(), noise(), noise()
    outputs = 0.2 * noise(method.head.n_outputs)
    outputs[..., 1:] = 5 * outputs[..., 1:] - 4.0
    outputs[..., 0] += 0.8 * rewards.sum(1, keepdim=True)  # a critic that explains something
    law = method.head.law(outputs)
    batch = SequenceBatch(
        rewards=rewards, loss_mask=mask, action_logp=action_logp,
        group=torch.tensor([0, 1, 2, 3] * 4), entropy=entropy, ref_logp=ref_logp,
        k=5, width=5,
        prompt_logp=torch.linspace(-2.0, -0.1, 48, dtype=torch.float64).view(16, 3),
        generator=torch.Generator().manual_seed(1), prompt=torch.tensor([0, 10, 20, 30] * 4),
        head_gradient=torch.linspace(-1.0, 2.0, 96, dtype=torch.float64).view(16, 6).sin(),
        extras={logp_at(factor): -action_logp.abs() / factor for factor in (0.5, 0.8, 1.0, 1.2)},
    )  # fmt: skip
    critic = None
    if config.critic != "none":
        batch.quantiles, batch.probs = law.quantiles(config.n_quantiles), law.probs
        batch.support = method.head.support
    method.prepare(batch)
    if config.critic != "none":
        critic = critic_loss(method.head, outputs, batch)
    logp = batch.action_logp + moved
    losses = distrl_losses(
        method.policy_loss(logp, batch),
        method.regularisation(logp, batch),
        batch.entropy,
        critic,
        method.aggregation(batch),
        token_weights(mask),
        TrainingSettings.of(config),
        config.entropy_coeff,
    )
    parts = [batch.advantages[mask], losses.total.reshape(1)]
    if batch.quantiles is not None:
        parts += [batch.target_quantiles[mask].flatten()]
    return torch.cat(parts)


@pytest.mark.parametrize(("kind", "name", "critic"), CASES)
def test_a_setting_changes_the_numbers_or_is_refused(kind, name, critic):
    chosen = settings_with(kind, name, critic=critic)
    if (message := refusal(chosen)) is not None:
        assert not critic and "reads the critic" in message
        return
    # Which target it is matters where the critic's own law is a part of it.
    below = {**chosen, "critic_lambda": 0.9} if critic else chosen
    start, start_below = outcome(chosen), outcome(below)
    for setting, value in MATHS.items():
        of_targets = setting in ("target", "quantile_loss")
        plain = start_below if of_targets else start
        changed = {**(below if of_targets else chosen), setting: value}
        message = refusal(changed)
        if message is None:
            found = outcome(changed)
            same = found.shape == plain.shape and torch.equal(found, plain)
            # What `distrl view` shows of the critic where there is no bonus.
            shown = setting == "bonus_stat" and critic
            assert not same or shown, f"{setting} is dropped in silence"
        elif "nothing that is chosen reads it" in message:
            assert message.startswith(f"{setting} is ")
            found = outcome(changed)
            assert torch.equal(found, plain), f"{setting} is refused but read"


@pytest.mark.parametrize("setting", ELSEWHERE | OF_TARGETS)
def test_settings_around_the_method_are_refused_where_nothing_reads_them(setting):
    value, around = (ELSEWHERE | OF_TARGETS)[setting]
    if "critic" in around:
        around = {"advantage": {"name": "reinforce_pp"}, **around, "bonus_coeff": 0.0}
    if "n_quantiles" in around:
        around = {**around, "bonus_coeff": 0.0}
    assert refusal(around) is None
    assert setting in refusal({**around, setting: value})


def test_every_setting_of_training_is_tried():
    ours = {
        name
        for name, parameter in inspect.signature(DistRLConfig.training).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert ours - ALWAYS - set(MATHS) - set(ELSEWHERE) == set()
    assert not (ALWAYS | set(ELSEWHERE)) & set(MATHS)


@pytest.mark.parametrize(
    ("name", "training", "words"),
    [
        ("GRPO", {"gamma": 0.9}, "not discounted.*gamma = 1.0"),
        ("DistRL", {"gamma": 0.9, "shapers": [{"name": "pass_at_k"}]}, "on returns.*gamma = 1.0"),
        ("GRPO", {"lambda_": 0.9}, r"lambda_ is 0.9.*advantage 'gae'.*Leave lambda_ out"),
        ("GRPO", {"n_quantiles": 4}, "n_quantiles is 4.*read by: a critic"),
        ("LAD", {"clip_param": 0.1}, "clip_param is 0.1.*policy_loss 'clip'"),
        ("LAD", {"dual_clip": 3.0}, "dual_clip is 3.0"),
        ("GSPO", {"dual_clip": 3.0}, "dual_clip is 3.0"),
        ("DistRL", {"policy_loss": {"name": "clip", "clip_param": 0.1}, "clip_param": 0.3},
         "clip_param is 0.3"),
        ("DistRL", {"shapers": [{"name": "dltv"}]}, "the bonus would count twice"),
        ("DistRL", {"shapers": [{"name": "dltv"}], "bonus_coeff": 0.0}, "with no bonus"),
        ("DistRL", {"shapers": [{"name": "entropy_shaped"}] * 2}, "'entropy_shaped' 2 times"),
        ("DistRL", {"shapers": [{"name": "pass_at_k", "calibrate": False, "prior_weight": 4.0}]},
         "prior_weight = 4.0, which its other settings"),
        ("DistRL", {"advantage": {"name": "zero"}}, "the bonus would be 0 too"),
    ],
)  # fmt: skip
def test_what_is_dropped_is_named_with_who_reads_it(name, training, words):
    config = algorithm_config(name).environment("distrl_envs:distrl/Countdown-v0")
    config.rl_module(model_config={"model": "builtin:countdown-tiny"})
    config.rollout(prompts_per_iteration=2, num_generations=4, max_completion_tokens=24)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        config.training(**training).validate()


def bounds(config):
    stage = Method.from_config(config).policy_loss
    return stage.settings["clip_param"], stage.settings["clip_param_high"]


def test_gspo_and_clip_cov_take_the_bounds_of_training():
    assert bounds(algorithm_config("GSPO")) == (3e-4, 4e-4)
    assert bounds(algorithm_config("GSPO").training(clip_param=0.2)) == (0.2, 4e-4)
    in_distrl = DistRLConfig().training(policy_loss={"name": "gspo"})
    assert bounds(in_distrl) == (3e-4, 4e-4)
    assert bounds(in_distrl.training(clip_param=1e-3, clip_param_high=2e-3)) == (1e-3, 2e-3)
    cov = DistRLConfig().training(policy_loss={"name": "clip_cov"}, clip_param_high=0.28)
    assert bounds(cov) == (0.2, 0.28)
