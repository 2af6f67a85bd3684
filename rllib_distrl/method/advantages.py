"""Advantage estimators: (batch, settings) to (B, T), on whole groups, 0 in the padding."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from rllib_distrl.maths import advantages as critic_maths
from rllib_distrl.maths import credit, laws
from rllib_distrl.maths import group_advantages as group_maths
from rllib_distrl.maths.calibration import TIE_WIDTH
from rllib_distrl.maths.group_advantages import (
    check_unit_returns,
    leave_one_out_posterior,
    logit_shift,
    shifted_edges,
)
from rllib_distrl.maths.laws import gain_over_best, law_of_batch
from rllib_distrl.maths.statistics import masked_mean, row_mean, zero_padding
from rllib_distrl.method.batch import SequenceBatch, forget_oldest, of_batch, takes_settings_of
from rllib_distrl.method.registry import (
    demand,
    logp_at,
    register,
    smallest_group,
)
from rllib_distrl.settings import Count, NotNegative, Positive, Share

_F = TypeVar("_F", bound=Callable[..., Tensor])

SOURCES = ("quantiles", "values", "returns")
"""What may be known of a prompt: the critic's law, its value, or the batch's returns alone."""

register("advantage", "gae")(of_batch(critic_maths.gae))


def _check_length_gae(*, alpha: float) -> None:
    if alpha <= 0:
        raise ValueError(f"advantage 'length_gae' has alpha {alpha}; it must be above 0.")


register("advantage", "length_gae", check=_check_length_gae)(of_batch(critic_maths.length_gae))
register("advantage", "macro_gae")(of_batch(credit.macro_gae))
register("advantage", "grpo")(of_batch(group_maths.grpo, per_row=True))
register("advantage", "rloo")(of_batch(group_maths.leave_one_out, per_row=True))


def _zero_fits(config: Any) -> None:
    if config.bonus_coeff > 0 and config.bonus_max_ratio is not None:
        raise ValueError(
            f"advantage 'zero' leaves bonus_max_ratio = {config.bonus_max_ratio} nothing to be a "
            "share of: the bonus would be 0 too. Set bonus_max_ratio = None ('none' in a recipe), "
            "or bonus_coeff = 0."
        )


@register("advantage", "zero", fits=_zero_fits)
def zero(batch: SequenceBatch) -> Tensor:
    """No advantage at all: what remains is the bonus and the regularisers (an ablation).

    The bonus then needs `bonus_max_ratio` off: its cap is a share of the advantages' std.
    """
    return torch.zeros_like(batch.action_logp)


@register("advantage", "dr_grpo", needs=("groups",))
def dr_grpo(batch: SequenceBatch) -> Tensor:
    """R − group mean; belongs with the `constant` aggregation."""
    return batch.at_tokens(group_maths.grpo(batch.returns, batch.group, scale_by_std=False))


@register("advantage", "reinforce_pp")
def reinforce_pp(batch: SequenceBatch, *, gamma: float = 1.0) -> Tensor:
    """Reward to go, whitened over the batch; the KL is subtracted by the reward stage.

    REINFORCE++ (Hu 2025).
    """
    to_go = critic_maths.returns_to_go(batch.rewards, batch.loss_mask, gamma)
    return critic_maths.whiten(to_go, batch.loss_mask, batch.all_reduce)


@register("advantage", "spro", needs=("groups", "ref_logp"))
def spro(batch: SequenceBatch, *, beta: float = 0.05, std_epsilon: float = 1e-6) -> Tensor:
    """GRPO's advantage and, at each token, R̃_t less its mean over the group's that still run.

    R̃_t = β Σ_{j≤t} ln(π/π_ref) of the policy that sampled, the process reward that a policy carries
    in itself (SPRO, arXiv 2507.01551, after notes on it); β is our choice.
    """
    of_group = group_maths.grpo(batch.returns, batch.group, std_epsilon=std_epsilon)
    gained = zero_padding(batch.action_logp - batch.column("ref_logp"), batch.loss_mask)
    step = credit.step_relative(beta * gained.cumsum(1), batch.group, batch.loss_mask)
    return batch.at_tokens(of_group) + step


def _of_several_rewards(config: Any, **settings: Any) -> None:
    if not config.reward_transforms:
        raise ValueError(
            "advantage 'gdpo' standardises each reward by itself, and there is one, the task's: "
            "that is advantage 'grpo'. Use it, or name reward_transforms."
        )


@register("advantage", "gdpo", needs=("groups",), fits=_of_several_rewards)
@takes_settings_of(group_maths.gdpo)
def gdpo(batch: SequenceBatch, **settings: Any) -> Tensor:
    """`maths.group_advantages.gdpo` of the task's return and what each reward transform adds."""
    parts = batch.returns.unsqueeze(1) if batch.reward_parts is None else batch.reward_parts
    return batch.at_tokens(group_maths.gdpo(parts, batch.group, **settings))


@register(
    "advantage",
    "optimal_token_baseline",
    needs=lambda settings: {"groups", logp_at(1.0), logp_at(0.5)},
)
def optimal_token_baseline(batch: SequenceBatch) -> Tensor:
    """`maths.group_advantages.optimal_token_baseline` with the policy's own Σ_v π_v².

    arXiv 2602.07078.
    """
    logp = batch.column(logp_at(1.0))
    energy = 1.0 - 2.0 * logp.exp() + (2.0 * logp - batch.column(logp_at(0.5))).exp()
    to_go = critic_maths.returns_to_go(batch.rewards, batch.loss_mask, 1.0)
    return group_maths.optimal_token_baseline(to_go, energy, batch.group, batch.loss_mask)


def _check_aapo(*, low: float, high: float, std_epsilon: float) -> None:
    if min(low, high) < 0:
        raise ValueError(f"advantage 'aapo' takes low and high >= 0; got {low} and {high}")


@register("advantage", "aapo", needs=("groups",), check=_check_aapo)
def aapo(
    batch: SequenceBatch, *, low: float = 0.2, high: float = 0.28, std_epsilon: float = 1e-6
) -> Tensor:
    """GRPO's advantage + clip(R − R_ref, −low, high): also equal groups move, if better than once.

    AAPO (arXiv 2505.14264), which samples R_ref with the reference policy. Here it is the mean
    return of the prompt's group when it was first served (our choice: it costs nothing, and needs
    prompts that come back). Remembers the last 100,000 prompts. Belongs with a loss without clip.

    Args:
        batch: With `prompt`.
        low: Largest loss that counts, ≥ 0.
        high: Largest gain that counts, ≥ 0.
        std_epsilon: Added to the std.

    Returns:
        (B, T).
    """
    returns, group = batch.returns, batch.group
    relative = group_maths.from_first(returns, group)
    mean = returns - relative + group_maths.group_mean(relative, group)
    rows = torch.stack([batch.column("prompt").double(), mean.double()], dim=1)
    first = batch.memory.setdefault("aapo", {})
    for prompt, value in batch.all_gather(rows).tolist():
        first.setdefault(int(prompt), value)
    once = [first[int(prompt)] for prompt in batch.column("prompt").tolist()]
    forget_oldest(first)
    gained = returns - torch.tensor(once, dtype=returns.dtype, device=returns.device)
    of_group = group_maths.grpo(returns, group, std_epsilon=std_epsilon)
    return batch.at_tokens(of_group + gained.clamp(-low, high))


def _right(batch: SequenceBatch, method: str) -> Tensor:
    """(B,), bool: which completions are right.

    Raises:
        ValueError: For returns other than 0 and 1.
    """
    returns = batch.returns
    if bool(((returns != 0) & (returns != 1)).any()):
        raise ValueError(
            f"advantage {method!r} is of right and wrong completions and needs returns of 0 and 1; "
            f"got {returns[(returns != 0) & (returns != 1)][0]:g}. Leave reward_transforms out, or "
            "use advantage 'grpo' with shaper 'entropy_shaped'."
        )
    return returns == 1


@register("advantage", "entropy_credit_token", needs=("groups", "entropy"))
def entropy_credit_token(
    batch: SequenceBatch, *, alpha: NotNegative = 0.1, low: NotNegative = 0.2, high: Positive = 0.28
) -> Tensor:
    """`maths.credit.entropy_credit` of tokens among the group's that still run.

    GTPO (arXiv 2508.04349).
    """
    right = _right(batch, "entropy_credit_token").unsqueeze(1).expand_as(batch.loss_mask)
    entropy = batch.column("entropy").clamp(low, high)
    return credit.entropy_credit(entropy, right, batch.group, batch.loss_mask, alpha)


@register("advantage", "entropy_credit_seq", needs=("groups", "entropy"))
def entropy_credit_seq(
    batch: SequenceBatch, *, alpha: NotNegative = 0.1, low: NotNegative = 0.2, high: Positive = 0.28
) -> Tensor:
    """`maths.credit.entropy_credit` of whole completions' mean entropies.

    GRPO-S (arXiv 2508.04349). Belongs with a loss of sequence ratios, `gspo`.
    """
    right = _right(batch, "entropy_credit_seq").unsqueeze(1)
    mean = row_mean(batch.column("entropy").clamp(low, high), batch.loss_mask).unsqueeze(1)
    whole = torch.ones_like(right)
    return batch.at_tokens(credit.entropy_credit(mean, right, batch.group, whole, alpha)[:, 0])


def _noise_forward_fits(config: Any, **settings: Any) -> None:
    demand(config, "advantage 'noise_forward'", whiten_advantages=False)


@register("advantage", "noise_forward", fits=_noise_forward_fits)
def noise_forward(batch: SequenceBatch, *, false_negative_rate: float) -> Tensor:
    """ρ1 for a completion that passed, ρ1 − 1 for one that did not.

    Under a verifier that rejects right answers with probability ρ1 and accepts no wrong one, the
    expectation is (1 − ρ1)(r* − 1), r* the true reward: its gradient up to scale and baseline
    (arXiv 2510.00915, forward correction). Returns above 1/2 count as passed.

    Raises:
        ValueError: For a rate outside [0, 1).
    """
    if not 0.0 <= false_negative_rate < 1.0:
        raise ValueError(
            f"noise_forward needs 0 <= false_negative_rate < 1, got {false_negative_rate}"
        )
    failed = (batch.returns <= 0.5).to(batch.rewards.dtype)
    return batch.at_tokens(false_negative_rate - failed)


def _opo_fits(config: Any) -> None:
    demand(config, "advantage 'opo'", whiten_advantages=False, num_epochs=1, entropy_coeff=0.0)


register("advantage", "opo", fits=_opo_fits)(of_batch(group_maths.opo, per_row=True))


def _maxk_fits(config: Any, *, k: int) -> None:
    demand(config, "advantage 'maxk'", whiten_advantages=False)
    group = smallest_group(config)
    if not 1 <= k <= group:
        raise ValueError(
            f"advantage 'maxk' has k = {k}, but a group has {group} completions at the least. "
            "Choose 1 <= k <= num_generations, or n_min of the allocator."
        )


register("advantage", "maxk", fits=_maxk_fits)(of_batch(group_maths.maxk, per_row=True))


def _bnpo_fits(config: Any, *, return_min: float, return_max: float) -> None:
    demand(config, "advantage 'bnpo'", whiten_advantages=False)
    if not return_min < return_max:
        raise ValueError(f"advantage 'bnpo' needs return_min < return_max, got {return_min} and "
                         f"{return_max}.")  # fmt: skip


@register("advantage", "bnpo", needs=("groups",), fits=_bnpo_fits)
def bnpo(batch: SequenceBatch, *, return_min: float = 0.0, return_max: float = 1.0) -> Tensor:
    """`maths.group_advantages.bnpo` of returns mapped from [return_min, return_max] to [0, 1]."""
    returns = (batch.returns - return_min) / (return_max - return_min)
    return batch.at_tokens(group_maths.bnpo(returns, batch.group, batch.all_reduce))


@register("advantage", "blended", needs=("groups", "values"))
def blended(batch: SequenceBatch, *, lambda_: float = 0.95) -> Tensor:
    """RLOO's advantage and the critic's GAE, by how much of the batch the critic explains.

    (1 − w)(R − mean of the others) + w GAE, w = max(0, explained variance of the batch's returns):
    with a critic that explains nothing it is `rloo` to the last bit. After EVPO and V_0.5 (arXiv
    2603.10848); that w is shared by all tokens is our choice. It reads the returns that it weighs,
    a bias that shrinks with the batch. Logged: `blended_critic_weight`.
    """
    of_group = batch.at_tokens(group_maths.leave_one_out(batch.returns, batch.group))
    values, mask = batch.column("values"), batch.loss_mask
    to_go = critic_maths.returns_to_go(batch.rewards, mask)
    weight = critic_maths.critic_weight(values, to_go, mask, batch.all_reduce)
    batch.metrics["blended_critic_weight"] = float(weight)
    of_critic = critic_maths.gae(values, batch.rewards, mask, 1.0, lambda_)
    return torch.where(weight > 0, torch.lerp(of_group, of_critic, weight), of_group)


def _value_mix_fits(config: Any, **_: Any) -> None:
    demand(config, "advantage 'value_mix'", gamma=1.0)


@register("advantage", "value_mix", needs=("values",), fits=_value_mix_fits)
def value_mix(
    batch: SequenceBatch, *, weight: Share = 0.5, decay: Share = 0.99, lambda_: float = 0.95
) -> Tensor:
    """GAE on (1 − w) V + w V_prior, w = weight · decay^{k−1}: a young critic is leant on less.

    V_prior is the prompt's mean return at its earlier visits, and before any the batch's mean, less
    what has been rewarded so far. What the prior is and its schedule are our choice; with weight 0
    it is `gae`. Remembers the last 100,000 prompts. Logged: `value_mix_weight`.

    Args:
        batch: With `prompt`; returns undiscounted.
        weight: w in the first iteration.
        decay: Of w per iteration.
        lambda_: λ.

    Returns:
        (B, T).
    """
    returns, mask = batch.returns, batch.loss_mask
    rows = torch.ones_like(returns, dtype=torch.bool)
    mean = float(masked_mean(returns, rows, batch.all_reduce))
    seen: dict[int, list[float]] = batch.memory.setdefault("value_mix", {})
    prompts = batch.column("prompt")
    known = (seen.get(prompt, [mean, 1.0]) for prompt in prompts.tolist())
    prior = returns.new_tensor([total / count for total, count in known])
    told = torch.stack([prompts.double(), returns.double()], dim=1)
    for prompt, value in batch.all_gather(told).tolist():
        total, count = seen.pop(int(prompt), [0.0, 0.0])
        seen[int(prompt)] = [total + value, count + 1.0]
    forget_oldest(seen)
    w = batch.metrics["value_mix_weight"] = weight * decay ** (batch.k - 1)
    rewards = zero_padding(batch.rewards, mask)
    to_come = prior.unsqueeze(1) - (rewards.cumsum(1) - rewards)
    values = zero_padding(batch.column("values"), mask).lerp(to_come.to(batch.rewards.dtype), w)
    return critic_maths.gae(zero_padding(values, mask), batch.rewards, mask, 1.0, lambda_)


def unused_of_group(settings: Mapping[str, Any]) -> set[str]:
    """What of a calibration's settings is not read: without it the source counts for itself."""
    return set() if settings["calibrate"] else {"prior_weight"}


def source_needs(settings: Mapping[str, Any]) -> set[str]:
    """The columns of what is known of a prompt, and the group where that is calibrated by it."""
    groups = {"groups"} if settings["calibrate"] else set()
    return groups | {str(settings["source"])} - {"returns"}


def _check_best_of_k(*, k: int, source: str, prior_weight: float, **_: Any) -> None:
    if k < 1 or k != int(k):
        raise ValueError(f"advantage 'best_of_k' takes a whole number k >= 1; got {k}")
    if source not in SOURCES:
        raise ValueError(f"advantage 'best_of_k' takes source in {SOURCES}; got {source!r}")
    if not prior_weight > 0:
        raise ValueError(f"advantage 'best_of_k' takes prior_weight > 0; got {prior_weight}")


def _best_of_k_fits(config: Any, **_: Any) -> None:
    demand(config, "advantage 'best_of_k'", gamma=1.0)


@register(
    "advantage",
    "best_of_k",
    needs=source_needs,
    check=_check_best_of_k,
    fits=_best_of_k_fits,
    ignores=unused_of_group,
)
def best_of_k(
    batch: SequenceBatch,
    *,
    k: int = 4,
    source: str = "quantiles",
    calibrate: bool = True,
    prior_weight: float = 2.0,
    lambda_: float = 1.0,
) -> Tensor:
    """GAE of u(R), what a completion adds to the best of k − 1 others; see `maths.best_of_k`.

    The baseline is E[u(R) | s_t] by the critic's law at s_t, so that tokens are credited with
    what they do to the best of k, not to the mean. Ours; returns in [0, 1] and undiscounted.
    k = 1 is GAE on group-calibrated values. Works for groups smaller than k, and of one without
    calibration.

    Args:
        batch: Any, with the source's column.
        k: ≥ 1.
        source: Whose law: the critic's "quantiles"; its scalar "values", around which returns
            are spread as in the whole batch (proportional odds; Bernoulli(V) for 0/1 returns);
            or "returns" of the batch alone (no critic: the control, one baseline per prompt).
        calibrate: Whether the group's other returns shift the law, leave-one-out.
        prior_weight: n₀, completions that the source counts for.
        lambda_: λ.

    Returns:
        (B, T).

    Raises:
        ValueError: For returns outside [0, 1].
    """
    total = batch.returns
    check_unit_returns(total, "advantage 'best_of_k'")
    atoms, edges = _law_of_states(batch, source)
    prior = (atoms * edges.diff(dim=-1)).sum(-1)[:, 0].clamp(0.0, 1.0)
    if calibrate:
        posterior = leave_one_out_posterior(prior, total, batch.group, prior_weight)
        edges = shifted_edges(edges, logit_shift(posterior, prior).unsqueeze(1))
    at_prompt = atoms[:, 0], edges[:, 0]
    value = (gain_over_best(atoms, *at_prompt, k) * edges.diff(dim=-1)).sum(-1)
    gain = gain_over_best(total, *at_prompt, k)
    batch.metrics["best_of_k_gain_mean"] = float(gain.mean())
    return _gae_of_gain(batch, gain, value, lambda_)


def _gae_of_gain(batch: SequenceBatch, gain: Tensor, value: Tensor, lambda_: float) -> Tensor:
    """GAE of a gain (B,) paid at each row's last token; `value`, its expectation, (B, T or 1)."""
    steps = torch.arange(batch.loss_mask.shape[1], device=gain.device)
    at_end = torch.where(steps == batch.lengths.unsqueeze(1) - 1, gain.unsqueeze(1), 0.0)
    return critic_maths.gae(value.expand_as(at_end), at_end, batch.loss_mask, 1.0, lambda_)


def _law_of_states(batch: SequenceBatch, source: str) -> tuple[Tensor, Tensor]:
    """The law of the whole return, given each state: atoms (B, T, N) and edges (B, T, N + 1).

    T is 1 where they are the same at every token.
    """
    rewards = zero_padding(batch.rewards, batch.loss_mask)
    so_far = rewards.cumsum(1) - rewards
    if source == "quantiles":
        law = batch.law.moved(so_far)
        return law.atoms, law.edges
    atoms, edges = law_of_batch(batch.returns, batch.all_reduce)
    mean = (atoms * edges.diff()).sum()
    atoms = atoms.expand(len(batch), 1, -1)
    if source == "returns":
        return atoms, edges.expand(len(batch), 1, -1)
    values = (zero_padding(batch.column("values"), batch.loss_mask) + so_far).clamp(0.0, 1.0)
    return atoms, shifted_edges(edges, logit_shift(values, mean))


def _law_fits(config: Any, name: str) -> None:
    what = f"advantage {name!r}"
    demand(config, what, gamma=1.0)
    if config.n_quantiles == 1:
        raise ValueError(
            f"{what} compares a return with the critic's law at the prompt, but n_quantiles is 1, "
            "a value alone. Set n_quantiles >= 2, or use advantage 'gae'."
        )


def _of_law(name: str) -> Callable[[_F], _F]:
    """`register` of an advantage that reads the critic's law at the prompt."""
    return register(
        "advantage",
        name,
        needs=("quantiles",),
        fits=lambda config, **_: _law_fits(config, name),
        ignores=lambda settings: set() if settings["per_token"] else {"lambda_"},
        own_defaults=("lambda_",),
    )


def _relative_to_law(
    batch: SequenceBatch,
    worth: Callable[[Tensor, laws.Law], Tensor],
    per_token: bool,
    lambda_: float,
) -> Tensor:
    """g(R) − E[g(Z)] with g relative to the law at the prompt, Z of the law there or at s_t."""
    law = _law_at_states(batch)
    prompt = law[:, 0]
    gain = worth(batch.returns.to(law.atoms.dtype), prompt)
    if not per_token:
        return batch.at_tokens(gain - prompt.expectation(worth(prompt.atoms, prompt)))
    return _gae_of_gain(batch, gain, law.expectation(worth(law.atoms, prompt)), lambda_)


def _law_at_states(batch: SequenceBatch) -> laws.Law:
    """The law (B, T, N) of the whole return, given each state."""
    rewards = zero_padding(batch.rewards, batch.loss_mask)
    return batch.law.moved(rewards.cumsum(1) - rewards)


@_of_law("rank")
def rank(
    batch: SequenceBatch,
    *,
    tie_width: NotNegative = TIE_WIDTH,
    per_token: bool = False,
    lambda_: Share = 1.0,
) -> Tensor:
    """2 F(R | s_0) − 1: the rank of the return in the critic's law at the prompt, without a group.

    Ours. `maths.laws.rank`; bounded by ±1 (per token by ±2), and the same for returns at any scale
    if `tie_width` follows it.

    Args:
        batch: With quantiles; returns undiscounted.
        tie_width: Atoms this close to the return tie with it, in units of the return. 0/1 rewards
            need some: quantiles stop a little short of 0 and 1. 0 suits continuous ones.
        per_token: Whether token t's baseline is E[g] by the law at s_t; else by that at s_0.
        lambda_: λ of GAE on these; 1 is g(R) − E[g(Z_t)].
    """
    return _relative_to_law(
        batch, lambda x, prompt: laws.rank(x, prompt, tie_width), per_token, lambda_
    )


@_of_law("standardised")
def standardised(
    batch: SequenceBatch,
    *,
    min_std: Positive = 0.05,
    per_token: bool = False,
    lambda_: Share = 1.0,
) -> Tensor:
    """(R − mean)/std of the critic's law at the prompt: GRPO's advantage without a group.

    Ours. `maths.laws.standardised`.

    Args:
        batch: With quantiles; returns undiscounted.
        min_std: Least std to divide by, in units of the return.
        per_token: Whether token t's baseline is the value of s_t; else that of s_0.
        lambda_: λ of GAE on these; 1 is (R − V(s_t))/std(s_0).
    """
    return _relative_to_law(
        batch, lambda x, prompt: laws.standardised(x, prompt, min_std), per_token, lambda_
    )


@_of_law("utility")
def utility(
    batch: SequenceBatch, *, k: Count = 4, per_token: bool = False, lambda_: Share = 1.0
) -> Tensor:
    """h_k(R) = k ∫^R F^{k−1}, F the law at the prompt: the gradient of the expected best of k.

    Ours. `maths.laws.utility`. Returns of any range; `best_of_k` is it over k, with λ, calibrated
    by the group, for returns in [0, 1].

    Args:
        batch: With quantiles; returns undiscounted.
        k: ≥ 1; 1 is the return itself.
        per_token: Whether token t's baseline is E[h_k] by the law at s_t; else by that at s_0.
        lambda_: λ of GAE on these; 1 is h_k(R) − E[h_k(Z_t)].
    """
    return _relative_to_law(batch, lambda x, prompt: laws.utility(x, prompt, k), per_token, lambda_)
