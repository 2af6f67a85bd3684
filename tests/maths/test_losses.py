import math

import pytest
import torch

from rllib_distrl.maths.losses import (
    LAD_DIVERGENCES,
    clipped_surrogate,
    gspo,
    kl_estimate,
    lad,
    squared_value_loss,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_clipped_surrogate_by_hand():
    ratios, advantages = torch.tensor([[1.5, 0.5, 1.1]]), torch.tensor([[2.0, 2.0, -1.0]])
    loss = clipped_surrogate(ratios.log(), torch.zeros(1, 3), advantages)
    assert loss[0].tolist() == pytest.approx([-2.4, -1.0, 1.1])
    # With A < 0: outside below the band the clipped value holds, above it the plain one.
    loss = clipped_surrogate(ratios.log(), torch.zeros(1, 3), torch.full((1, 3), -1.0))
    assert loss[0].tolist() == pytest.approx([1.5, 0.8, 1.1])


def test_upper_bound_and_dual_clip_by_hand():
    ratios = torch.tensor([[1.5, 1.25, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0]])
    loss = clipped_surrogate(
        ratios.log(), torch.zeros(1, 3), advantages, clip_param_high=0.28, dual_clip=3.0
    )
    assert loss[0].tolist() == pytest.approx([-1.28, -1.25, 3.0])


def test_gradient_is_zero_where_clipped():
    logp = torch.tensor([[1.5, 0.9, 0.5]]).log().requires_grad_()
    clipped_surrogate(logp, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]])).sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([0.0, -0.9, 0.0])


def test_gspo_by_hand():
    # Row 1: mean log-ratio (.3 - .1 + .1)/3 = .1; row 2: its single token's .02.
    logp = torch.tensor([[0.3, -0.1, 0.1], [0.02, 5.0, 5.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    loss = gspo(logp, torch.zeros(2, 3), advantages, clip_param=0.5, clip_param_high=0.05,
                loss_mask=MASK)  # fmt: skip
    assert loss[0].tolist() == pytest.approx([-1.05] * 3)
    assert loss[1].tolist() == pytest.approx([2 * math.exp(0.02), 0, 0])


def test_gspo_of_single_tokens_is_ppo():
    logp, old, advantages = (tensor[:, :1] for tensor in random_batch())
    expected = clipped_surrogate(logp, old, advantages, clip_param=0.1, clip_param_high=0.3)
    found = gspo(logp, old, advantages, clip_param=0.1, clip_param_high=0.3)
    assert torch.allclose(found, expected)


def test_value_loss_by_hand():
    loss = squared_value_loss(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.5, 0.0]]), 10.0)
    assert loss[0].tolist() == [0.25, 10.0]


@pytest.mark.parametrize("divergence", LAD_DIVERGENCES)
def test_lad_equals_its_formula(divergence):
    logp, old, advantages = random_batch()
    loss = lad(logp, old, advantages, divergence=divergence, inverse_eta=0.7, ratio_level="token")
    for b in range(2):
        for t in range(3):
            u = 0.7 * advantages[b, t].item()
            x = math.exp(logp[b, t] - old[b, t] - u)
            f = {
                "js": 0.5 * (x * math.log(x) - (x + 1) * math.log((x + 1) / 2)),
                "hellinger": 0.5 * (math.sqrt(x) - 1) ** 2,
                "tv": abs(x - 1),
                "kl": x * math.log(x),
                "reverse_kl": -math.log(x),
                "jeffreys": (x - 1) * math.log(x),
            }[divergence]
            assert loss[b, t].item() == pytest.approx(math.exp(u) * f, rel=1e-9)


def test_lad_of_a_sequence_uses_the_product_of_ratios():
    logp = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    zeros, advantages = torch.zeros_like(logp), torch.full_like(logp, 0.5)
    whole = lad(logp, zeros, advantages, inverse_eta=1.0)
    single = lad(logp.sum(1, keepdim=True), zeros[:, :1], advantages[:, :1], inverse_eta=1.0)
    assert torch.allclose(whole, single.expand(1, 3))


@pytest.mark.parametrize("divergence", [d for d in LAD_DIVERGENCES if d != "tv"])
def test_lad_optimum_is_the_tilted_policy(divergence):
    # A bandit of four arms with two good ones: all expectations exact, pi_old uneven.
    old = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    target = old * (advantages / 0.8).exp()
    target /= target.sum()
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=300,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        logp = logits.log_softmax(0)
        loss = lad(
            logp.view(4, 1), old.log().view(4, 1), advantages.view(4, 1),
            divergence=divergence, inverse_eta=1 / 0.8,
        )  # fmt: skip
        total = (old * loss.squeeze(1)).sum()
        total.backward()
        return total

    optimiser.step(closure)
    assert torch.allclose(logits.softmax(0), target, atol=1e-4)


def test_lad_at_the_first_step_is_reinforce_with_a_softplus_weight():
    advantages = torch.tensor([[0.9, -1.3]], dtype=torch.float64)
    logp = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    lad(logp, torch.zeros_like(logp), advantages, ratio_level="token").sum().backward()
    expected = -0.5 * (torch.nn.functional.softplus(4 * advantages) - math.log(2))
    assert torch.allclose(logp.grad, expected)


def test_lad_survives_extreme_ratios():
    logp = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    loss = lad(logp, torch.zeros(2, 1), torch.tensor([[-50.0], [50.0]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, o, a: clipped_surrogate(p, o, a),
        lambda p, o, a: gspo(p, o, a),
        lambda p, o, a: lad(p, o, a, ratio_level="token"),
        lambda p, o, a: lad(p, o, a),
        lambda p, o, a: kl_estimate(p, o, "k2"),
        lambda p, o, a: kl_estimate(p, o, "k3"),
    ],
)
@pytest.mark.parametrize("old", [-1e4, -200.0, 0.0])
def test_one_token_far_from_the_sampler_leaves_the_others_their_gradient(loss, old):
    """In float32, where e^89 is infinite and infinity times zero is no number."""
    action_logp = torch.tensor([[-1.0, -1.5, -0.5], [old, -1.0, -2.0]])
    logp = torch.tensor([[-1.01, -1.48, -0.5], [-150.0, -1.0, -2.02]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    result = loss(logp, action_logp, advantages)
    result.sum().backward()
    assert torch.isfinite(result).all() and torch.isfinite(logp.grad).all()
    alone = torch.tensor(logp[:1].tolist(), requires_grad=True)
    loss(alone, action_logp[:1], advantages[:1]).sum().backward()
    assert torch.equal(logp.grad[:1], alone.grad)
    assert logp.grad[1, 0].abs() <= 10.0


@pytest.mark.parametrize(("estimator", "reverse"), [("k2", False), ("k3", True)])
def test_which_kl_the_gradient_of_an_estimator_is(estimator, reverse):
    """Exact over four tokens: KL(pi || ref) for k2, KL(ref || pi) for k3, nothing for k1."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    ref = torch.tensor([-0.5, 0.4, 0.2, 0.9], dtype=torch.float64).log_softmax(0)
    p, q = (ref.exp(), logp) if reverse else (logp.exp(), ref)
    kl = (p * (ref - q if reverse else logp - q)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    # Tokens are drawn from pi: its probabilities are weights, without gradient.
    mean = (logp.detach().exp() * kl_estimate(logp, ref, estimator)).sum()
    (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
    assert torch.allclose(found, expected)
    nothing = (logp.detach().exp() * kl_estimate(logp, ref, "k1")).sum()
    (found,) = torch.autograd.grad(nothing, logits)
    assert found.abs().max() < 1e-12


def test_kl_goes_on_as_a_line_beyond_ten_nats():
    logp, ref = torch.tensor([[-15.0]], requires_grad=True), torch.zeros(1, 1)
    loss = kl_estimate(logp, ref, "k2")
    loss.sum().backward()
    assert loss.item() == 10 * (15 - 5)
    assert logp.grad.item() == -10.0  # still pulled back


LOSSES = {
    "clip": lambda p, o, a, m=None: clipped_surrogate(p, o, a, dual_clip=1.5, loss_mask=m),
    "gspo": lambda p, o, a, m=None: gspo(p, o, a, clip_param=0.3, clip_param_high=0.4, loss_mask=m),
    "lad_token": lambda p, o, a, m=None: lad(p, o, a, ratio_level="token", loss_mask=m),
    "lad_sequence": lambda p, o, a, m=None: lad(p, o, a, inverse_eta=0.5, loss_mask=m),
    "value": lambda p, o, a, m=None: squared_value_loss(p, o, 2.0, m),
    "k1": lambda p, o, a, m=None: kl_estimate(p, o, "k1", m),
    "k2": lambda p, o, a, m=None: kl_estimate(p, o, "k2", m),
    "k3": lambda p, o, a, m=None: kl_estimate(p, o, "k3", m),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_double_precision(name):
    logp, old, advantages = random_batch(3)
    logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, old, advantages, MASK), (logp,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [math.nan, 1e9])
def test_padding_moves_neither_loss_nor_gradient(name, filler):
    clean = [torch.where(MASK, tensor, 0.0) for tensor in random_batch(4)]
    dirty = [torch.where(MASK, tensor, filler) for tensor in clean]
    results = []
    for logp, old, advantages in (clean, dirty):
        logp = logp.clone().requires_grad_()
        loss = LOSSES[name](logp, old, advantages, MASK)
        loss.sum().backward()
        results.append((loss.detach(), logp.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][0][~MASK] == 0).all()


def test_kl_by_hand_and_on_average():
    logp, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert kl_estimate(logp, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logp, ref, "k2").item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):
        mean = (p * kl_estimate(p.log(), q.log(), estimator)).sum().item()
        assert mean == pytest.approx(exact)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: clipped_surrogate(z, z, z, dual_clip=1.0), "dual_clip"),
        (lambda z: clipped_surrogate(z, z, z, ratio_level="row"), "ratio_level"),
        (lambda z: lad(z, z, z, ratio_level="row"), "ratio_level"),
        (lambda z: lad(z, z, z, divergence="chi2"), "divergence"),
        (lambda z: kl_estimate(z, z, "k4"), "kl_estimator"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(1, 1))
