"""What a researcher would write without any library: the yardsticks for our own overhead."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.workload import LR
from rllib_distrl.engine.compiled_decoder import CompiledDecoder
from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.engine.sampling import sample
from rllib_distrl.maths.advantages import TARGETS
from rllib_distrl.maths.quantiles import center_delta, quantile_huber_loss


class DecodeLoop:
    """Our decoder in the shortest loop there is: rows never end, nothing is kept but tensors."""

    def __init__(self, model: Any):
        self.decoder = CompiledDecoder(model.config, torch.device("cpu"), torch.float32)
        for name, view in self.decoder.canonical().items():
            view.copy_(model.state_dict()[name].reshape(view.shape))

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], generations: int, max_tokens: int) -> int:
        """Samples; returns the number of tokens."""
        rows, width = len(prompts) * generations, len(prompts[0])
        params = SamplingParams(max_tokens)
        tokens = torch.empty(rows, max_tokens, dtype=torch.int64)
        logps = torch.empty(rows, max_tokens)
        uniforms = torch.rand(max_tokens, rows, dtype=torch.float64)
        self.decoder.open(rows, width, width + max_tokens)
        index = np.repeat(np.arange(len(prompts)), generations)
        logits = self.decoder.admit([tuple(prompt) for prompt in prompts], index)
        for step in range(max_tokens):
            if step:
                logits = self.decoder.step(tokens[:, step - 1])
            tokens[:, step], logps[:, step], _ = sample(logits, uniforms[step], params)
        self.decoder.close()
        return tokens.numel()


class Update:
    """DistRL's update of equally long completions in plain PyTorch, from ready tensors.

    A critic of its own trunk, a pass for the old quantiles, D-GAE, advantages of the mean,
    clipped surrogate, quantile Huber loss, gradient clipping, Adam; whole batch at once.
    """

    def __init__(self, model: Any, n_quantiles: int):
        self.policy, self.critic = copy.deepcopy(model), copy.deepcopy(model.model)
        self.head = nn.Linear(model.config.hidden_size, n_quantiles)
        critic = [*self.critic.parameters(), *self.head.parameters()]
        self.parameters = [list(self.policy.parameters()), critic]
        self.optimizers = [torch.optim.Adam(group, lr=LR) for group in self.parameters]

    def run(
        self, ids: torch.Tensor, logps: torch.Tensor, rewards: torch.Tensor, prompt: int
    ) -> int:
        """One step.

        Args:
            ids: (B, P + T), prompts and completions.
            logps: (B, T), of the sampler.
            rewards: (B, T).
            prompt: P.

        Returns:
            The number of tokens learned from.
        """
        mask = torch.ones_like(logps, dtype=torch.bool)
        with torch.no_grad():
            old = self._quantiles(ids, prompt)
            targets = TARGETS["comonotone"](old, rewards, mask, gamma=1.0, lambda_=0.95)
            advantages = self._advantages(old.mean(-1), rewards)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        hidden = self.policy.model(input_ids=ids, use_cache=False).last_hidden_state
        scores = self.policy.lm_head(hidden[:, prompt - 1 : -1]).log_softmax(-1)
        new = scores.gather(-1, ids[:, prompt:, None]).squeeze(-1)
        ratio = (new - logps).exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        critic_loss = quantile_huber_loss(self._quantiles(ids, prompt), targets)
        (critic_loss.mean() - surrogate.mean()).backward()
        for group, optimizer in zip(self.parameters, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
        return logps.numel()

    def _quantiles(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        hidden = self.critic(input_ids=ids, use_cache=False).last_hidden_state
        return center_delta(self.head(hidden[:, prompt - 1 : -1]))

    @staticmethod
    def _advantages(values: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        advantages, running = torch.zeros_like(values), torch.zeros(len(values))
        following = torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + following - values[:, t]
            running = delta + 0.95 * running
            following, advantages[:, t] = values[:, t], running
        return (advantages - advantages.mean()) / advantages.std()
