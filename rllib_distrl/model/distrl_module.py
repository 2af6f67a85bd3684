"""The language model with a critic that knows the return distribution."""

from typing import Any

import torch

from rllib_distrl.maths.quantiles import center_delta, center_delta_bias
from rllib_distrl.model.causal_lm_module import CausalLMModule


class DistRLModule(CausalLMModule):
    """`CausalLMModule` with N ordered quantiles of the return in place of one value.

    Further ``model_config`` keys: ``n_quantiles``, ``head_center`` (``mean`` or ``median``),
    ``init_spread``.
    """

    def setup(self) -> None:
        """Loads the model, makes the critic, and starts its quantiles close together."""
        super().setup()
        if self.has_critic:
            loaded = bool(self.model_config.get("critic_checkpoint"))
            self.register_buffer("value_initialised", torch.tensor(loaded))
            if not loaded:
                self.initialise_values(0.0)
                self.value_initialised.fill_(False)

    @property
    def n_value_outputs(self) -> int:
        """Outputs of the value head: a centre and N - 1 gaps."""
        return int(self.model_config["n_quantiles"])

    def get_non_inference_attributes(self) -> list[str]:
        """What an env runner does without."""
        return [*super().get_non_inference_attributes(), "value_initialised"]

    def initialise_values(self, value: float) -> None:
        """Lets every state's quantiles start around ``value``, in units of the return."""
        bias = center_delta_bias(self.n_value_outputs, value, self.model_config["init_spread"])
        with torch.no_grad():
            self.value_head.bias.copy_(bias)
            self.value_initialised.fill_(True)

    def compute_quantiles(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ordered quantiles (B, T, N) of the return from the state before each token."""
        outputs = self.value_outputs(batch, embeddings)
        return center_delta(outputs, self.model_config["head_center"])

    def compute_values(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the quantiles (B, T): what RLlib's own pieces take as the value."""
        return self.compute_quantiles(batch, embeddings).mean(-1)
