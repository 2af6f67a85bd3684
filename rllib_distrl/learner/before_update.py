"""The one pass before the update: what the stages read of the models, without gradients."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rllib_distrl.learner.reference import Reference
from rllib_distrl.model.sequences import Sequences, from_columns

# What needs the policy's own hidden states.
_OF_POLICY = {"entropy", "hidden", "prompt_logp"}
# What the uncertainty makes of hidden states, in each micro-batch: they themselves, (B, T, H) of a
# whole batch, are kept only for a stage that declares that it reads them.
FEATURES = "features"
MODEL_COLUMNS = frozenset({*_OF_POLICY, "quantiles", "ref_logp"})


def model_columns(
    module: Any,
    reference: Reference | None,
    columns: dict[str, Tensor],
    needs: Collection[str],
    features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Runs policy, critic and reference once over a batch, each only if something needs it.

    Args:
        module: `DistRLModule`.
        reference: of ``ref_logp``, else None.
        columns: of `SequencesFromEpisodes`.
        needs: which of `MODEL_COLUMNS`.
        features: makes (B, T, D) of hidden states (B, T, H).

    Returns:
        The columns by the names and shapes of `SequenceBatch`, zeros in the padding, and
        ``features``, if they are asked for.
    """
    if not needs and features is None:
        return {}
    sequences = from_columns(columns)
    rows, steps = sequences.actions.shape
    widths = {"prompt_logp": int(sequences.prompt_lens.max())}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for index in module.micro_batches(sequences):
            parts = _read(module, reference, sequences.rows(index), needs, features)
            for name, part in parts.items():
                if name not in found:
                    width = widths.get(name, steps)
                    found[name] = part.new_zeros(rows, width, *part.shape[2:])
                found[name][index, : part.shape[1]] = part
    return found


def _read(
    module: Any,
    reference: Reference | None,
    rows: Sequences,
    needs: Collection[str],
    features: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    states = None
    if features is not None or not _OF_POLICY.isdisjoint(needs):
        hidden = module.hidden(module.policy, rows)
        states = rows.states(hidden)
        if "prompt_logp" in needs:
            found["prompt_logp"] = _prompt_logp(module, rows, hidden)
        if "hidden" in needs:
            found["hidden"] = states
        if features is not None:
            found[FEATURES] = features(states)
        if "entropy" in needs:
            found["entropy"] = module._sampled_tokens(module.policy, states, rows)[..., 1]
    if "quantiles" in needs:
        found["quantiles"] = module.compute_quantiles({}, module._critic_states(rows, states))
    if reference is not None and "ref_logp" in needs:
        found["ref_logp"] = reference.logp(rows)
    return found


def _prompt_logp(module: Any, rows: Sequences, hidden: Tensor) -> Tensor:
    """(B, P) logps of the prompts' tokens after the first; 0 there and in the padding."""
    width = int(rows.prompt_lens.max())
    position = torch.arange(1, width, device=hidden.device)
    inside = position < rows.prompt_lens.unsqueeze(1)
    logp, _ = module.token_logps(
        module.policy, hidden[:, : width - 1][inside], rows.input_ids[:, 1:width][inside]
    )
    found = logp.new_zeros(len(hidden), width)
    found[:, 1:][inside] = logp
    return found
