"""Whether the learner computes what the model computes: tried on every model before it learns.

The learner's path differs from a model's own forward pass: rows are packed, prompts that rows share
are computed once, logits exist in chunks only. That a model allows this is not taken from its
flags: logps of random tokens are compared with those of its own forward pass.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray.rllib.core.columns import Columns
from torch import Tensor

from rllib_distrl.model.causal_lm import (
    gist,
    let_pack_rows,
    ordinary_tokens,
    own_logits,
    unpack_rows,
)
from rllib_distrl.model.loading import resolve
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS

# Prompt and completion lengths of the rows tried: two that share a prompt, and two that do not.
_ROWS = (("a", 4, 4), ("a", 4, 2), ("b", 2, 5), ("c", 3, 3))
TOLERANCE = 1e-3
"""Largest |logp difference| that counts as agreement in float32, times the logits' spread where
that is below 1. Measured over the architectures of docs/models.md: right ones stay below a tenth
of it, wrong ones are above ten times as much."""


class TrainingPath(NamedTuple):
    """How a learner computes a model, and how well.

    Attributes:
        packs: Whether rows are packed; otherwise they are padded.
        difference: Largest |logp difference| from the model's own forward pass.
    """

    packs: bool
    difference: float


# What was found for the folders that were checked in this process, by their content.
_checked: dict[tuple[Any, ...], TrainingPath] = {}


def prepare_policy(module: Any) -> TrainingPath:
    """Lets a module's policy pack rows where that is exact, and checks what the learner computes.

    In float32 on the weights as they were loaded; once per folder and process.

    Args:
        module: `CausalLMModule` with a policy and its `logit_map`.

    Returns:
        What was found.

    Raises:
        ValueError: If the learner would compute other logps than the model, naming it and what
            deviates.
    """
    key = _content(module.model_config["model"])
    if key not in _checked:
        precision, module.precision = module.precision, "fp32"
        try:
            _checked[key] = _check(module)
        finally:
            module.precision = precision
    elif _checked[key].packs:
        let_pack_rows(module.policy)
    return _checked[key]


def _check(module: Any) -> TrainingPath:
    policy, name = module.policy, type(module.policy).__name__
    rows, columns = _batch(policy)
    own, spread = _own_logps(policy, rows, module.temperature)
    later = _reads_later_tokens(policy, rows[0])
    tolerance = TOLERANCE * min(1.0, spread)
    if later > tolerance:
        raise ValueError(
            f"{name} is no causal model: its prediction of a token depends on the tokens after it "
            f"(logps differ by {later:.2g} once they are there), as an encoder's do. Choose a "
            "decoder."
        )
    if attention := let_pack_rows(policy):
        # An error or a difference only means that this model needs padded rows.
        difference = _difference(lambda: module.compute_logps(columns), own)
        if difference <= tolerance:
            return TrainingPath(True, difference)
        unpack_rows(policy, attention)
    try:
        found = module.compute_logps(columns)
    except Exception as error:
        raise ValueError(
            f"The learner cannot compute {name} ({gist(error)}). Choose another model."
        ) from error
    if (difference := _difference(lambda: found, own)) > tolerance:
        raise ValueError(
            f"The learner computes other probabilities than {name} does: logps of rows with "
            f"padding differ by up to {difference:.2g} from its own forward pass, where "
            f"{tolerance:.1g} is allowed. Choose another model."
        )
    return TrainingPath(False, difference)


def _batch(policy: Any) -> tuple[list[tuple[list[int], int]], dict[str, Tensor]]:
    """Rows of tokens with the lengths of their prompts, and the same as a batch's columns."""
    drawn = iter(ordinary_tokens(policy.config, 64))
    prompts = {name: [next(drawn) for _ in range(n)] for name, n, _ in _ROWS}
    rows = [([*prompts[name], *(next(drawn) for _ in range(m))], n) for name, n, m in _ROWS]
    width, steps = max(len(ids) for ids, _ in rows), max(m for _, _, m in _ROWS)
    columns = {
        INPUT_IDS: torch.zeros(len(rows), width, dtype=torch.long),
        PROMPT_LENS: torch.tensor([n for _, n in rows]),
        Columns.ACTIONS: torch.zeros(len(rows), steps, dtype=torch.long),
        Columns.LOSS_MASK: torch.zeros(len(rows), steps, dtype=torch.bool),
    }
    for row, (ids, n) in enumerate(rows):
        columns[INPUT_IDS][row, : len(ids)] = torch.tensor(ids)
        columns[Columns.ACTIONS][row, : len(ids) - n] = torch.tensor(ids[n:])
        columns[Columns.LOSS_MASK][row, : len(ids) - n] = True
    return rows, {name: x.to(policy.device) for name, x in columns.items()}


def _own_logps(
    policy: Any, rows: Sequence[tuple[list[int], int]], temperature: float
) -> tuple[list[Tensor], float]:
    """Logps of each row's completion by the model's own forward pass, and its logits' spread."""
    found, spreads = [], []
    for ids, n in rows:
        logits = own_logits(policy, ids)[n - 1 : -1]
        picked = (logits / temperature).log_softmax(-1)
        found.append(picked.gather(-1, torch.tensor(ids[n:], device=logits.device)[:, None])[:, 0])
        spreads.append(float(logits.std(-1).mean()))
    return found, sum(spreads) / len(spreads)


def _reads_later_tokens(policy: Any, row: tuple[list[int], int]) -> float:
    """By how much logps after a prompt change when the completion stands behind it."""
    ids, n = row
    alone, followed = (own_logits(policy, x)[n - 1].log_softmax(-1) for x in (ids[:n], ids))
    return float((alone - followed).abs().max())


def _difference(compute: Callable[[], Tensor], own: Sequence[Tensor]) -> float:
    """Largest |difference| of logps; infinite where they cannot be computed."""
    try:
        found = compute()
    except Exception:
        return float("inf")
    pairs = zip(found, own, strict=True)
    worst = max(float((row[: len(x)] - x).abs().max()) for row, x in pairs)
    return worst if worst == worst else float("inf")


def _content(name: str) -> tuple[Any, ...]:
    """What tells one model from another: its source and its files' times and sizes."""
    source = resolve(name)
    if not Path(source).is_dir():
        return (source,)
    files = sorted(file for file in Path(source).iterdir() if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return (source, *((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
