import math
import time

import pytest
import torch

from rllib_distrl.maths.lm_head import LogitMap, score_by_hidden, token_logps


def case(m=37, h=6, v=11, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, h, dtype=dtype, generator=g, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, generator=g, requires_grad=True)
    bias = torch.randn(v, dtype=dtype, generator=g, requires_grad=True)
    targets = torch.randint(v, (m,), generator=g)
    return hidden, weight, bias, targets


def plain(hidden, weight, bias, targets, temperature):
    logits = (hidden.float() @ weight.float().T + (0 if bias is None else bias)) / temperature
    logp = logits.log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return logp.gather(1, targets[:, None])[:, 0], entropy


def loss_of(logp, entropy):
    scale = torch.linspace(-1, 2, len(logp))
    return (scale * logp).sum() + (scale.flip(0) * entropy.square()).sum()


@pytest.mark.parametrize("chunk", [1, 8, 37, 100, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_plain_computation(chunk, with_bias):
    *tensors, targets = case()
    tensors = tensors if with_bias else tensors[:2]
    bias = tensors[2] if with_bias else None
    expected = plain(tensors[0], tensors[1], bias, targets, 0.7)
    gradients = torch.autograd.grad(loss_of(*expected), tensors)
    found = token_logps(tensors[0], tensors[1], targets, bias=bias, temperature=0.7, chunk=chunk)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss_of(*found), tensors), gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 10])
def test_gradients_in_double_precision(chunk):
    hidden, weight, bias, targets = case(5, 3, 4, torch.float64)

    def function(h, w, b):
        return token_logps(h, w, targets, bias=b, temperature=1.3, chunk=chunk)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    # Each output alone: the other's gradient is then absent rather than zero.
    assert torch.autograd.gradcheck(lambda *a: function(*a)[0], (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: function(*a)[1], (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(frozen):
    *tensors, targets = case()
    tensors[frozen].requires_grad_(False)
    logp, entropy = token_logps(tensors[0], tensors[1], targets, bias=tensors[2], chunk=8)
    loss_of(logp, entropy).backward()
    for number, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (number == frozen)


MAPS = [LogitMap(0.3), LogitMap(cap=1.5), LogitMap(2.5, 0.7)]


@pytest.mark.parametrize("logit_map", MAPS, ids=str)
@pytest.mark.parametrize("chunk", [2, 10])
def test_gradients_through_a_scale_and_a_cap(logit_map, chunk):
    hidden, weight, bias, targets = case(5, 3, 4, torch.float64)

    def function(h, w, b):
        return token_logps(h, w, targets, bias=b, temperature=1.3, logit_map=logit_map, chunk=chunk)

    z = hidden @ weight.T + bias
    cap = logit_map.cap
    capped = logit_map.scale * z if cap is None else cap * torch.tanh(logit_map.scale * z / cap)
    expected = torch.distributions.Categorical(logits=capped / 1.3)
    logp, entropy = function(hidden, weight, bias)
    torch.testing.assert_close(logp, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_a_cap_by_hand():
    # 2 tanh(3 / 2) and 2 tanh(-1 / 2): their difference is 2 (0.9051483 + 0.4621172).
    logp, _ = token_logps(
        torch.ones(1, 1), torch.tensor([[3.0], [-1.0]]), torch.tensor([1]),
        logit_map=LogitMap(cap=2.0),
    )  # fmt: skip
    assert logp.item() == pytest.approx(-2.7345310 - math.log1p(math.exp(-2.7345310)), abs=1e-6)


def test_uniform_logits_by_hand():
    logp, entropy = token_logps(torch.ones(3, 2), torch.zeros(5, 2), torch.tensor([0, 1, 4]))
    assert logp.tolist() == pytest.approx([-1.6094379] * 3)
    assert entropy.tolist() == pytest.approx([1.6094379] * 3)


def test_half_precision_logits_are_not_rounded():
    hidden, weight, _, targets = case(20, 64, 50)
    half = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logp, _ = token_logps(*half, targets)
    expected, _ = plain(*half, None, targets, 1.0)
    assert logp.dtype == torch.float32
    assert torch.allclose(logp, expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, None])
def test_under_autocast_logits_are_not_rounded(chunk):
    hidden, weight, bias, targets = case(20, 16, 50)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logps(low, weight, targets, bias=bias, temperature=0.7, chunk=chunk)
        loss_of(*found).backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # left as it was
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert (low.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    rounded = [low.detach().float(), weight.detach().bfloat16().float(), bias.detach()]
    for tensor in rounded:
        tensor.requires_grad_()
    expected = plain(*rounded, targets, 0.7)
    loss_of(*expected).backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # Gradients by logits are rounded to 2^-9 of each number at most, then their products are.
    for ours, theirs in zip((low, weight, bias), rounded, strict=True):
        assert 0 < (ours.grad.float() - theirs.grad).norm() < 2**-8 * theirs.grad.norm()


def test_no_tokens():
    hidden, weight, _, _ = case()
    logp, entropy = token_logps(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert (weight.grad == 0).all()


def test_no_tensor_of_tokens_by_vocabulary_is_kept():
    hidden, weight, _, targets = case(512, 8, 300)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (largest.append(t.numel()), t)[1], lambda t: t
    ):
        logp, _ = token_logps(hidden, weight, targets, chunk=64)
    assert max(largest) == hidden.numel()
    # Neither does the backward pass make one: count every tensor it allocates.
    with torch.profiler.profile(profile_memory=True) as profile:
        logp.sum().backward()
    allocations = [e.nbytes() for e in profile.profiler.kineto_results.events()
                   if e.name() == "[memory]"]  # fmt: skip
    assert allocations
    assert max(allocations) < 512 * 300 * 4


def test_single_chunk_costs_about_what_log_softmax_costs():
    hidden, weight, bias, targets = case(4600, 64, 112)

    def seconds(function):
        best = float("inf")
        for _ in range(12):
            start = time.process_time()
            logp, entropy = function()
            (logp.sum() + entropy.sum()).backward()
            best = min(best, time.process_time() - start)
        return best

    def straight():
        logps = (hidden @ weight.T + bias).log_softmax(-1)
        return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    ours = seconds(lambda: token_logps(hidden, weight, targets, bias=bias))
    assert ours < 2.0 * seconds(straight)


def test_refuses_a_temperature_of_zero():
    hidden, weight, _, targets = case()
    with pytest.raises(ValueError, match="temperature"):
        token_logps(hidden, weight, targets, temperature=0.0)


@pytest.mark.parametrize("chunk", [1, 8, None])
def test_the_score_by_hidden_is_the_gradient_of_logp_times_the_temperature(chunk):
    hidden, weight, bias, targets = case(9, 5, 7, torch.float64)
    logp, _ = token_logps(hidden, weight, targets, bias=bias, temperature=0.7)
    (gradient,) = torch.autograd.grad(logp.sum(), hidden)
    found = score_by_hidden(hidden, weight, targets, bias=bias, temperature=0.7, chunk=chunk)
    torch.testing.assert_close(found, 0.7 * gradient)
    assert not found.requires_grad
