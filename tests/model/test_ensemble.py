import math

import pytest
import torch

from rllib_distrl.model.critics import Ensemble


def ensemble(prior_scale=0.5, **settings):
    return Ensemble(
        6, **{"size": 3, "width": 8, "depth": 2, "prior_scale": prior_scale, "seed": 4, **settings}
    )


def embeddings(rows=2, steps=5):
    return torch.randn(rows, steps, 6, generator=torch.Generator().manual_seed(1))


def test_a_member_computes_what_a_loop_does():
    model, x = ensemble(depth=1), embeddings(1)
    part = model.priors
    found = part(x)
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    rate = [1e4 ** (-j / 8) for j in range(0, 8, 2)]
    for k in range(3):
        hidden = x[0] @ part.inputs[k]
        for t in range(5):
            hidden[t] += torch.tensor(
                [math.sin(t * r) for r in rate] + [math.cos(t * r) for r in rate]
            )
        q, key, value = (norm(hidden) @ part.attention[0][k]).split(8, dim=-1)
        for t in range(5):
            weights = torch.softmax(q[t] @ key[: t + 1].t() / math.sqrt(8), -1)
            both = torch.cat([norm(hidden[t]), weights @ value[: t + 1]])
            state = hidden[t] + torch.nn.functional.gelu(both @ part.up[0][k]) @ part.down[0][k]
            expected = (norm(state) @ part.output[k]).item()
            assert found[k, 0, t].item() == pytest.approx(expected, abs=1e-5)


def test_before_learning_members_are_the_value_and_their_priors():
    model, x = ensemble(), embeddings()
    model.start_at(0.3)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(model(x), 0.3 + 0.5 * model.priors(unit))
    assert model(x).std(0).min() > 0.01
    flat = ensemble(prior_scale=0.0)
    assert torch.equal(flat(x), torch.zeros(3, 2, 5))


def test_values_know_only_what_precedes_them():
    model, x = ensemble(), embeddings()
    changed = x.clone()
    changed[:, 3:] = 9.0
    assert torch.equal(model(x)[..., :3], model(changed)[..., :3])
    assert not torch.equal(model(x)[..., 3:], model(changed)[..., 3:])


def test_only_the_members_learn():
    model = ensemble()
    model(embeddings().requires_grad_()).square().sum().backward()
    assert all(p.grad is None for p in model.priors.parameters())
    assert model.members.output.grad.abs().max() > 0


def test_members_agree_where_they_have_learned_and_not_elsewhere():
    model = ensemble(size=6, width=16)
    taught, other = embeddings(8)[:, :1], -embeddings(9)[8:, :1]
    before = model(taught).std(0).mean()
    optimizer = torch.optim.Adam(model.members.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (model(taught) - 0.2).square().sum().backward()
        optimizer.step()
    assert model(taught).std(0).mean() < 0.1 * before
    assert model(other).std(0).mean() > 3 * model(taught).std(0).mean()
