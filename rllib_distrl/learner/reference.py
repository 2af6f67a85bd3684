"""The reference policy of KL terms: the policy as it was before training."""

from contextlib import nullcontext
from typing import Any

import torch

from rllib_distrl.engine.weights import content_hash
from rllib_distrl.model.causal_lm import let_pack_rows, packs_rows
from rllib_distrl.model.loading import load_model
from rllib_distrl.model.lora import adapters_off
from rllib_distrl.model.sequences import Sequences


class Reference:
    """A frozen copy of the initial policy, made from the model's source.

    It is not part of a checkpoint: on resuming it is made again, and its content hash, which
    is, must be the same (our choice: checkpoints stay small, and resuming stays bit-exact).
    A policy with adapters needs no copy: without them it is its own reference.

    Attributes:
        policy: the copy, or the policy itself.
    """

    def __init__(self, module: Any):
        """Loads the copy beside ``module``.

        Args:
            module: `CausalLMModule`, on its device.
        """
        self._module = module
        self._gathered: Any = nullcontext
        self._hash = ""
        self.policy: Any = module.policy
        if module.lora is None:
            device = next(module.parameters()).device
            self.policy = load_model(module.model_config["model"], device=device)
            self.policy.requires_grad_(False)
            if packs_rows(module.policy):
                let_pack_rows(self.policy)
            self._shard(module.sharding)

    def _shard(self, sharding: Any) -> None:
        if sharding is not None:
            self._hash = content_hash(self.policy.state_dict())  # No learner has all of it later.
            self._gathered = sharding.shard_beside(self.policy)

    def logp(self, sequences: Sequences) -> torch.Tensor:
        """(B, T) logps of the completion tokens at the sampling temperature; 0 in the padding."""
        policy = self.policy
        off = adapters_off(policy) if policy is self._module.policy else nullcontext()
        with off, self._gathered():
            states = self._module.states(policy, sequences)
            return self._module.sampled_tokens(policy, states, sequences)[..., 0]

    def get_state(self) -> dict[str, str]:
        """What a checkpoint must hold: the content hash of the copy; nothing without one."""
        if self.policy is self._module.policy:
            return {}
        return {"hash": self._hash or content_hash(self.policy.state_dict())}

    def set_state(self, state: dict[str, str]) -> None:
        """Checks that the run goes on with the reference it began with.

        Raises:
            ValueError: if the model's source has changed since the checkpoint was written.
        """
        own = self.get_state()
        if own and own != state:
            name = self._module.model_config["model"]
            raise ValueError(
                f"The reference policy is the model that training began with, and {name!r} is "
                f"another one now: content hash {own['hash'][:12]}, in the checkpoint "
                f"{state.get('hash', 'none')[:12]}. Restore the model's folder, or start a new run."
            )
