"""The learner's logps of what the engines sampled as their probes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from rllib_distrl.engine.weight_proof import Probe
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS


def score_probes(learner: Any, *, probes: Sequence[Probe]) -> list[np.ndarray]:
    """Logps (T,) of each probe's tokens under this learner's policy."""
    width = max(len(probe.prompt_ids) + len(probe.tokens) for probe in probes)
    steps = max(len(probe.tokens) for probe in probes)
    ids = torch.zeros(len(probes), width, dtype=torch.long)
    actions = torch.zeros(len(probes), steps, dtype=torch.long)
    mask = torch.zeros(len(probes), steps, dtype=torch.bool)
    for row, probe in enumerate(probes):
        whole = torch.tensor([*probe.prompt_ids, *probe.tokens.tolist()])
        ids[row, : len(whole)] = whole
        actions[row, : len(probe.tokens)] = whole[len(probe.prompt_ids) :]
        mask[row, : len(probe.tokens)] = True
    columns = {
        INPUT_IDS: ids,
        PROMPT_LENS: torch.tensor([len(probe.prompt_ids) for probe in probes]),
        Columns.ACTIONS: actions,
        Columns.LOSS_MASK: mask,
    }
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    logps = module.compute_logps({name: x.to(learner._device) for name, x in columns.items()})
    return [row[marked].cpu().numpy() for row, marked in zip(logps, mask, strict=True)]
