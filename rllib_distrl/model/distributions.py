"""A categorical distribution that remembers only what the losses need."""

from typing import Any

import gymnasium as gym
import torch
from ray.rllib.core.distribution.distribution import Distribution

N_INPUTS = 2


class SampledTokenDistribution(Distribution):
    """The policy over the vocabulary, reduced to the sampled token.

    Its inputs are (logp of the sampled token, entropy of the distribution), so that no
    (tokens x vocabulary) tensor leaves the model. Our choice; RLlib's PPO (with
    ``use_kl_loss=False``), APPO and IMPALA need nothing more.
    """

    def __init__(self, inputs: torch.Tensor):
        """Wraps ``inputs``.

        Args:
            inputs: (..., 2), the sampled token's logp and the entropy, both in nats.
        """
        self._logp, self._entropy = inputs.unbind(-1)

    def logp(self, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logp of the sampled tokens, shape (...); ``value`` must be those very tokens."""
        return self._logp

    def entropy(self) -> torch.Tensor:
        """Entropy over the vocabulary in nats, shape (...)."""
        return self._entropy

    def kl(self, other: Distribution, **kwargs: Any) -> torch.Tensor:
        """Refuses: two numbers per token do not determine a KL divergence.

        Raises:
            ValueError: always, with the setting to change.
        """
        raise ValueError(
            "The KL divergence over the whole vocabulary is not kept. "
            "Set `use_kl_loss=False` in `[training]`."
        )

    def sample(self, **kwargs: Any) -> torch.Tensor:
        """Refuses: the rollout engine samples, not the module.

        Raises:
            ValueError: always, with the runner class to use.
        """
        raise ValueError(
            "Tokens are sampled by the rollout engine: use "
            "`config.env_runners(env_runner_cls=CompletionEnvRunner)`."
        )

    def rsample(self, **kwargs: Any) -> torch.Tensor:
        """Refuses, as `sample` does."""
        return self.sample()

    @classmethod
    def from_logits(cls, logits: torch.Tensor, **kwargs: Any) -> "SampledTokenDistribution":
        """RLlib's constructor name; ``logits`` are the (..., 2) inputs."""
        return cls(logits)

    @staticmethod
    def required_input_dim(space: gym.Space, **kwargs: Any) -> int:
        """Two inputs, whatever the size of the vocabulary."""
        return N_INPUTS
