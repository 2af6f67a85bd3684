"""What a learner knows about tokens, without learning from them: its half of the token table."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo.ppo_learner import PPOLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor
from torch.nn.functional import linear

from rllib_distrl.learner.connector import SequencesFromEpisodes
from rllib_distrl.learner.distrl_learner import DistRLLearner
from rllib_distrl.maths.advantages import gae, whiten
from rllib_distrl.method.batch import SequenceBatch
from rllib_distrl.method.pipeline import Method
from rllib_distrl.model.sequences import from_columns
from rllib_distrl.model.sharding import with_weights

# Logits held at once while the likeliest tokens are picked.
_LOGITS = 2**24


def read_tokens(
    learner: TorchLearner, *, shards: Sequence[Any], k: int, n_top: int
) -> dict[str, Any]:
    """Scores this learner's shard of episodes; runs on every learner at once.

    Args:
        learner: `DistRLLearner`, or a stock learner of a `CausalLMModule`.
        shards: one reference to a list of whole episodes (whole groups) per learner.
        k: the training iteration that schedules are at.
        n_top: likeliest tokens to keep.

    Returns:
        ``rank``, ``mask`` (B, T), and arrays (B, T) or (B, T, n): ``logp``, ``entropy``,
        ``logp_difference``, ``top_ids``, ``top_logps``; with a critic ``value``; and what the
        algorithm makes of it: ``quantiles``, ``law_atoms`` and ``law_probs`` of a head with fixed
        atoms, ``bonus_statistic``, ``bonus``, ``advantage``,
        ``advantage_used``.
    """
    config: Any = learner.config
    rank = torch.distributed.get_rank() if config.num_learners > 1 else 0
    batch: dict[str, Any] = {}
    SequencesFromEpisodes()(rl_module=None, batch=batch, episodes=ray.get(shards[rank]))
    module = _module(learner)
    columns = {name: x.to(_device(module)) for name, x in batch[DEFAULT_MODULE_ID].items()}
    mask = columns[Columns.LOSS_MASK]
    with torch.no_grad():
        found = {**policy_columns(module, columns, n_top), **_critic(learner, columns, k)}
    found["logp_difference"] = found["logp"] - columns[Columns.ACTION_LOGP]
    return {"rank": rank, "mask": mask.cpu().numpy(), **_arrays(found)}


def judge_tokens(
    learner: DistRLLearner, *, shard: Any, level: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the critic says of whole episodes; neither policy nor stages are asked.

    Args:
        learner: with a critic.
        shard: a reference to a list of whole episodes.
        level: of the quantile, in (0, 1).

    Returns:
        Of each episode the value (T,) in the state before each token, and the quantile (T,): the
        least atom z with F(z) >= level.
    """
    columns = learner.columns(ray.get(shard))
    with torch.no_grad():
        law = learner.policy_module.compute_law(columns)
        upper = law.inverse(torch.full_like(law.atoms[..., :1], level)).squeeze(-1)
    mask = columns[Columns.LOSS_MASK]
    return tuple(  # type: ignore[return-value]
        [row[inside].cpu().numpy() for row, inside in zip(column, mask, strict=True)]
        for column in (law.mean, upper)
    )


def _arrays(found: dict[str, Tensor]) -> dict[str, Any]:
    return {name: x.detach().cpu().numpy() for name, x in found.items()}


def policy_columns(module: Any, columns: dict[str, Tensor], n_top: int) -> dict[str, Tensor]:
    """The policy's view of the tokens, micro-batch by micro-batch, logits chunk by chunk.

    Args:
        module: `CausalLMModule`.
        columns: of `SequencesFromEpisodes`.
        n_top: K, likeliest tokens to keep.

    Returns:
        ``logp`` and ``entropy`` (B, T), ``top_ids`` and ``top_logps`` (B, T, K); zero in the
        padding. All under the sampling temperature.
    """
    sequences = from_columns(columns)
    rows, steps = sequences.actions.shape
    head = module.policy.get_output_embeddings()
    n_top = min(n_top, head.weight.shape[0])
    found = {
        "logp": torch.zeros(rows, steps, device=head.weight.device),
        "entropy": torch.zeros(rows, steps, device=head.weight.device),
        "top_ids": torch.zeros(rows, steps, n_top, dtype=torch.long, device=head.weight.device),
        "top_logps": torch.zeros(rows, steps, n_top, device=head.weight.device),
    }
    with module.gathered():
        for index in module.micro_batches(sequences):
            part = sequences.rows(index)
            states = module.states(module.policy, part)
            width = part.actions.shape[1]
            outputs = module.sampled_tokens(module.policy, states, part)
            found["logp"][index, :width], found["entropy"][index, :width] = outputs.unbind(-1)
            ids, logps = _likeliest(states[part.mask], module, n_top)
            inside = torch.zeros(len(index), steps, dtype=torch.bool, device=ids.device)
            inside[:, :width] = part.mask
            where = index[inside.nonzero()[:, 0]], inside.nonzero()[:, 1]
            found["top_ids"][where], found["top_logps"][where] = ids, logps
    return found


def _likeliest(hidden: Tensor, module: Any, n: int) -> tuple[Tensor, Tensor]:
    """Ids and logps (M, n) of the likeliest tokens after each of M states."""
    head = module.policy.get_output_embeddings()

    def likeliest(hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids, logps = [], []
        for part in hidden.split(max(1, _LOGITS // head.weight.shape[0])):
            logits = module.logit_map(
                linear(part.to(head.weight.dtype), head.weight, head.bias).float()
            )
            scores = logits / module.temperature
            top = scores.topk(n, dim=-1)
            ids.append(top.indices)
            logps.append(top.values - scores.logsumexp(-1, keepdim=True))
        return torch.cat(ids), torch.cat(logps)

    return with_weights(head, likeliest, hidden)


def _critic(learner: TorchLearner, columns: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    if isinstance(learner, DistRLLearner):
        return _from_method(learner, columns, k)
    module = _module(learner)
    if not module.has_critic:
        return {}
    values = module.compute_values(columns)
    if not isinstance(learner, PPOLearner):
        return {"value": values}  # V-trace's advantages need the whole training batch.
    mask = columns[Columns.LOSS_MASK]
    config: Any = learner.config
    advantages = gae(values, columns[Columns.REWARDS], mask, config.gamma, config.lambda_)
    return {"value": values, "advantage": advantages, "advantage_used": whiten(advantages, mask)}


def _from_method(learner: DistRLLearner, columns: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The stages on these episodes, as an update would run them; nothing of the learner changes."""
    with _unstarted_critic_stays(learner.policy_module):
        rollouts = learner.batch_pass.looking()(columns, k).rollouts
    raw, bonus = _unshaped(learner.method, rollouts)
    found = {"advantage": raw, "advantage_used": rollouts.column("advantages")}
    if bonus is not None:
        found["bonus"] = bonus
    statistic = _statistic(learner.method, rollouts)
    if statistic is not None:
        found["bonus_statistic"] = statistic
    if rollouts.values is not None and rollouts.quantiles is not None:
        found["value"] = rollouts.values
        if rollouts.quantiles.shape[-1] > 1:
            found["quantiles"] = rollouts.quantiles
        if rollouts.probs is not None:
            found["law_atoms"], found["law_probs"] = rollouts.law.atoms, rollouts.law.weights
    return found


@contextmanager
def _unstarted_critic_stays(module: Any) -> Iterator[None]:
    """Takes back that a critic that has seen nothing starts at the mean of what it is shown."""
    fresh = module.has_critic and not bool(module.value_initialised)
    bias = module.value_head.bias.detach().clone() if fresh else None
    yield
    if fresh:
        module.value_head.bias.copy_(bias)
        module.value_initialised.fill_(False)


def _statistic(method: Method, rollouts: SequenceBatch) -> Tensor | None:
    """The uncertainty that the bonus is made of, where there is one; also with the bonus off."""
    stage = method.bonus_statistic
    of_quantiles = "quantiles" in stage.needs
    if of_quantiles and (rollouts.quantiles is None or rollouts.quantiles.shape[-1] < 2):
        return None
    return stage.of_whole(rollouts)


def _unshaped(method: Method, rollouts: SequenceBatch) -> tuple[Tensor, Tensor | None]:
    """The advantages before shaping, and what the optimism bonus adds to them."""
    raw = advantages = method.advantage.of_whole(rollouts)
    bonus = None
    for shaper in method.shapers:
        shaped = shaper.of_whole(rollouts, advantages)
        if shaper.method.name == "dltv":
            bonus = shaped - advantages
        advantages = shaped
    return raw, bonus


def _module(learner: TorchLearner) -> Any:
    """The `CausalLMModule`, without RLlib's wrapper for several learners."""
    module: Any = learner.module[DEFAULT_MODULE_ID]
    return module.unwrapped()


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device
