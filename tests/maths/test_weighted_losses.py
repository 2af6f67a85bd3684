"""Gradients by hand: of −w log π it is −w, of a function of ρ its slope times ρ."""

import math

import pytest
import torch

from rllib_distrl.maths import losses, weighted_losses

ADVANTAGES = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
RATIOS = torch.tensor([[1.5, 0.5, 1.1]], dtype=torch.float64)


def gradient(loss, ratios=RATIOS, advantages=ADVANTAGES, **settings):
    logp = (OLD + ratios.log()).requires_grad_()
    loss(logp, OLD, advantages, **settings).sum().backward()
    return logp.grad[0].tolist()


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    found = gradient(weighted_losses.cispo, clip_param_high=0.2)
    assert found == pytest.approx([-1.2 * 2, 0.5 * 1, -1.1 * 0.5])
    bounded = gradient(weighted_losses.cispo, clip_param=0.3, clip_param_high=None)
    assert bounded == pytest.approx([-1.3 * 2, 0.7 * 1, -1.1 * 0.5])


def test_double_sided_leaves_out_what_is_far_off_on_either_side():
    # Ratios 1.5, .5 and 1.1; inside of the bounds it is the plain importance-weighted gradient.
    found = gradient(weighted_losses.double_sided, clip_param=0.6, clip_param_high=5.0)
    assert found == pytest.approx([-1.5 * 2, 0.5 * 1, -1.1 * 0.5])
    below = gradient(weighted_losses.double_sided, clip_param=0.4, clip_param_high=5.0)
    assert below == pytest.approx([-1.5 * 2, 0.0, -1.1 * 0.5])
    both = gradient(weighted_losses.double_sided, clip_param=0.4, clip_param_high=None)
    assert both == pytest.approx([0.0, 0.0, -1.1 * 0.5])


def test_truncated_importance_is_cut_at_its_cap():
    assert gradient(weighted_losses.truncated_importance, cap=1.4) == pytest.approx(
        [-1.4 * 2, 0.5, -0.55]
    )
    with pytest.raises(ValueError, match="cap must be at least 1"):
        gradient(weighted_losses.truncated_importance, cap=0.9)


def test_sapo_by_hand():
    # d/dρ of (4/τ) σ(τ(ρ − 1)) is 4 σ(1 − σ); times ρ for log π.
    def slope(ratio, tau):
        s = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return 4 * s * (1 - s) * ratio

    expected = [-2 * slope(1.5, 1.0), 1 * slope(0.5, 3.0), -0.5 * slope(1.1, 1.0)]
    found = gradient(weighted_losses.sapo, gate_temperature_negative=3.0)
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="gate temperatures"):
        gradient(weighted_losses.sapo, gate_temperature=0.0)


@pytest.mark.parametrize(
    "loss",
    [
        weighted_losses.cispo, weighted_losses.truncated_importance, weighted_losses.sapo,
        weighted_losses.dppo, lambda *a, **s: weighted_losses.rpg(*a, beta=0.0, **s),
    ],
)  # fmt: skip
def test_on_policy_all_have_the_policy_gradient(loss):
    ones = torch.ones_like(RATIOS)
    surrogate = gradient(losses.clipped_surrogate, ones)
    assert gradient(loss, ones) == pytest.approx(surrogate)


def test_gmpo_by_hand():
    # A = 0.5 > 0: ln 1.5 = .405 is cut to .4 from above, ln .5 = −.693 stays; mean of the three.
    mean = (0.4 + math.log(0.5) + math.log(1.1)) / 3
    logp = (OLD + RATIOS.log()).requires_grad_()
    loss = weighted_losses.gmpo(logp, OLD, ADVANTAGES)
    assert loss[0].tolist() == pytest.approx([-0.5 * math.exp(mean)] * 3)
    loss[0, 0].backward()
    # The clipped token has no gradient, the others a third of the loss each.
    assert logp.grad[0].tolist() == pytest.approx([0, *[-0.5 * math.exp(mean) / 3] * 2])


def test_gmpo_of_equal_ratios_is_gspo_within_the_clips():
    ratios = torch.full_like(RATIOS, 1.01)
    advantages = torch.full_like(RATIOS, 0.7)
    gspo = gradient(losses.gspo, ratios, advantages, clip_param=0.5, clip_param_high=None)
    assert gradient(weighted_losses.gmpo, ratios, advantages) == pytest.approx(gspo)


def test_dppo_drops_what_moves_on_beyond_the_threshold():
    # π_old = e^-1, e^-2, e^-.5 = .368, .135, .607; π = .552, .068, .667: TV .184, .068, .061.
    assert gradient(weighted_losses.dppo, threshold=0.1) == pytest.approx([0, 0.5, -0.55])
    assert gradient(weighted_losses.dppo, threshold=0.065) == pytest.approx([0, 0, -0.55])
    # A token that comes back stays, however far it is.
    back = gradient(weighted_losses.dppo, advantages=-ADVANTAGES, threshold=0.01)
    assert back == pytest.approx([1.5 * 2, -0.5, 0.55])


def test_dppo_kl_is_that_of_two_points():
    p, q = math.exp(-1), 1.5 * math.exp(-1)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    for threshold, dropped in ((kl * 1.001, False), (kl * 0.999, True)):
        found = gradient(weighted_losses.dppo, divergence="kl", threshold=threshold)
        assert (found[0] == 0) is dropped
    with pytest.raises(ValueError, match="divergence must be one of"):
        gradient(weighted_losses.dppo, divergence="hellinger")


@pytest.mark.parametrize(
    ("name", "pull"),
    [
        ("forward_kl", lambda w: 1.0),
        ("reverse_kl", lambda w: -w * (math.log(w) + 1)),
        ("unnormalised_forward_kl", lambda w: 1 - w),
        ("unnormalised_reverse_kl", lambda w: -w * math.log(w)),
    ],
)
def test_rpg_by_hand(name, pull):
    clipped, advantages = [1.28, 0.8, 1.1], [2.0, -1.0, 0.5]
    expected = [-(a * w + 0.3 * pull(w)) for a, w in zip(advantages, clipped, strict=True)]
    assert gradient(weighted_losses.rpg, regulariser=name, beta=0.3) == pytest.approx(expected)


@pytest.mark.parametrize("name", weighted_losses.RPG_REGULARISERS)
def test_differentiable_kls_have_the_gradient_of_what_they_are_named_after(name):
    """Over a law of four tokens, sampled by itself: exact expectations against autograd."""
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    logits = torch.tensor([0.1, 0.7, -0.4, 0.2], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    # A sample weighs with the probability it was drawn with, which is the reference's here: then
    # mean f(w) over samples of π_ref is the f-divergence itself.
    loss = weighted_losses.differentiable_kl(logp[None], reference.log()[None], kl=name, coeff=1.0)
    (found,) = torch.autograd.grad((reference * loss[0]).sum(), logits, retain_graph=True)
    pi = logp.exp()
    forward, reverse = (
        (reference * (reference / pi).log()).sum(),
        (pi * (pi / reference).log()).sum(),
    )
    named = forward if "forward" in name else reverse
    (expected,) = torch.autograd.grad(named, logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "loss",
    [
        weighted_losses.cispo, weighted_losses.truncated_importance, weighted_losses.sapo,
        weighted_losses.gmpo, weighted_losses.dppo, weighted_losses.rpg,
    ],
)  # fmt: skip
@pytest.mark.parametrize("filler", [float("nan"), 1e9])
def test_padding_moves_nothing(loss, filler):
    mask = torch.tensor([[True, True, True, False]])
    wide = [
        torch.nn.functional.pad(x, (0, 1), value=filler)
        for x in (RATIOS.log() + OLD, OLD, ADVANTAGES)
    ]
    logp = wide[0].requires_grad_()
    found = loss(logp, wide[1], wide[2], loss_mask=mask)
    found.sum().backward()
    assert found[0, 3] == 0 and logp.grad[0, 3] == 0
    assert logp.grad[0, :3].tolist() == pytest.approx(gradient(loss))
