"""The tabular walk: 8 steps of ±1 from 0, return 1 where the end is above 2; all 256 walks."""

import itertools

import torch

from rllib_distrl.maths.advantages import TARGETS
from rllib_distrl.maths.quantiles import midpoints, quantile_huber_loss

STEPS, GOAL, N = 8, 2, 16
MOVES = torch.tensor(list(itertools.product((-1, 1), repeat=STEPS)))
POSITIONS = torch.cat([torch.zeros(len(MOVES), 1, dtype=torch.long), MOVES.cumsum(1)], dim=1)
# State number of each walk at each t.
STATES = torch.arange(STEPS) * (2 * STEPS + 1) + POSITIONS[:, :-1] + STEPS
REWARDS = torch.zeros(len(MOVES), STEPS)
REWARDS[:, -1] = (POSITIONS[:, -1] > GOAL).float()
MASK = torch.ones(len(MOVES), STEPS, dtype=torch.bool)


def success_probability():
    """(256, 8), p(s_t), by counting the walks through each state."""
    visits = torch.bincount(STATES.flatten())
    wins = torch.bincount(STATES.flatten(), REWARDS[:, -1:].expand(-1, STEPS).flatten())
    return (wins / visits.clamp(min=1))[STATES]


def trained_law(target, pairing, lambda_, kappa=0.05, iterations=300):
    """(256, 8, N), quantiles of a tabular critic at its fixed point over all walks at once."""
    generator = torch.Generator().manual_seed(0)
    count = (2 * STEPS + 1) * STEPS
    visits = torch.bincount(STATES.flatten(), minlength=count).clamp(min=1)
    theta = (0.05 + 0.1 * midpoints(N)).expand(count, N).clone()
    for iteration in range(iterations):
        rate = 0.02 ** (iteration / iterations)
        leaf = theta.clone().requires_grad_()
        quantiles = leaf[STATES]
        settings = {"gamma": 1.0, "lambda_": lambda_, "generator": generator}
        y = TARGETS[target](quantiles, REWARDS, MASK, **settings)
        quantile_huber_loss(quantiles, y, kappa, pairing).sum().backward()
        theta -= rate * N * leaf.grad / visits.unsqueeze(-1)
        # The center-delta head cannot cross; the table is kept ordered too.
        theta = theta.sort(-1).values
    return theta[STATES]


def trained_values(*settings, **more):
    """(256, 8), V of `trained_law`."""
    return trained_law(*settings, **more).mean(-1)
