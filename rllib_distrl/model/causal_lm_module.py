"""A causal language model as an RLModule: policy with a scalar critic, or one of the whole law."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, TargetNetworkAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.apis.target_network_api import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from torch import nn
from torch.nn.functional import linear

from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.engine.sampling import sample
from rllib_distrl.engine.weights import check_names
from rllib_distrl.maths.laws import Law
from rllib_distrl.maths.lm_head import score_by_hidden, token_logps
from rllib_distrl.maths.packing import first_of_prompt, split_by_token_budget, split_packed
from rllib_distrl.method.critic import Head, make_head
from rllib_distrl.model.causal_lm import (
    autocast,
    checkpoint_activations,
    freeze_attention,
    last_states,
    logit_map_of,
    packs_rows,
    trunk_of,
)
from rllib_distrl.model.critics import ObservationHead, draw_apart, load_critic
from rllib_distrl.model.loading import load_model
from rllib_distrl.model.lora import add_adapters, merged_state, trunk_beside
from rllib_distrl.model.self_check import prepare_policy
from rllib_distrl.model.sequences import (
    CRITIC_OBSERVATIONS,
    CRITIC_TEXT_IDS,
    INPUT_IDS,
    SampledTokenDistribution,
    Sequences,
    from_columns,
    from_incremental_obs,
    from_prompts,
)
from rllib_distrl.model.sharding import Sharding, share_of, whole, with_weights
from rllib_distrl.settings import (
    CRITIC_TRUNKS,
    NUMBERS_FOR_CRITICS,
    RolloutSettings,
    micro_batch_budget,
)

POLICY_PREFIX = "policy."
_RANGE = "range"


class CausalLMModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI, InferenceOnlyAPI):
    """Policy: a Hugging Face causal LM. Critic: a linear head on a trunk of states.

    ``model_config`` keys: ``model`` (path, hub id or ``builtin:...``), ``critic``
    (``separate``: own trunk, a copy of the policy's; ``twin``, of `DistRLModule` alone: two such
    critics; ``shared``: the policy's states; ``detached``: those without their gradient; ``none``),
    ``temperature`` of the sampling distribution, ``micro_batch_tokens``, ``precision`` (``fp32``,
    or ``bf16``: autocast of the trunks over float32 weights, with float32 logits),
    ``activation_checkpointing``, ``critic_observation`` (``state``, ``stock``: the critic's head
    also reads the column ``critic_observations``; ``text``: rows of a critic with a trunk of its
    own begin with ``critic_text_ids``), ``lora`` (see `lora.check_lora`; a critic with a trunk of
    its own then has adapters of its own on the same frozen weights) and ``seed``,
    ``critic_checkpoint`` (a folder of `save_critic` to start such a critic from), and
    ``max_seq_len`` for RLlib's own connectors.

    Serves both worlds: sequence batches of `SequencesFromEpisodes`, and the (B, T, ...)
    batches of RLlib's own learners with ``obs_mode="incremental"``. Prompts without actions
    (`from_prompts`) are answered by `forward_inference` and `forward_exploration` with the next
    token of each.

    Attributes:
        lends_weights: whether a learner's module hands its own memory to env runners, who read it
            and never write to it, in place of a copy. For one process, where nobody reads what was
            handed out while the learner learns.
    """

    lends_weights = False
    _borrows = False  # whether an env runner's tensors are arrays that somebody else has

    def setup(self) -> None:
        """Loads the model and, on a learner, makes the critic."""
        self.policy: Any = load_model(self.model_config["model"])
        self.temperature = float(self.model_config.get("temperature", 1.0))
        self.critic_kind = self.model_config.get("critic", "separate")
        self.n_critics = CRITIC_TRUNKS.get(self.critic_kind, 0)
        self.critic_observation = self.model_config.get("critic_observation", "none")
        self.micro_batch_tokens = micro_batch_budget(
            self.model_config.get("micro_batch_tokens", "auto")
        )
        self.precision = self.model_config.get("precision", "fp32")
        # Env runners sample with the merged weights and know nothing of adapters.
        self.lora = None if self.inference_only else self.model_config.get("lora")
        self.action_dist_cls = SampledTokenDistribution
        self.logit_map = logit_map_of(self.policy)
        self.sharding: Sharding | None = None
        if not self.inference_only:
            prepare_policy(self)
            self._prepare_training()

    def _prepare_training(self) -> None:
        if self.n_critics:
            trunks = [self._trunk_of_critic() for _ in range(self.n_critics)]
            self.critic = trunks[0] if len(trunks) == 1 else nn.ModuleList(trunks)
        if self.critic_kind != "none":
            self._make_value_head()
        seed = 2 * int(self.model_config.get("seed") or 0)
        for number, model in enumerate((self.policy, *self.critics)):
            if self.lora is not None:
                add_adapters(model, self.lora, seed + number)
            if self.model_config.get("activation_checkpointing", False):
                checkpoint_activations(model)

    def _trunk_of_critic(self) -> nn.Module:
        if self.lora is not None:
            return trunk_beside(self.policy)
        trunk = copy.deepcopy(trunk_of(self.policy))
        if self.model_config.get("critic_freeze", "none") == "attention":
            freeze_attention(trunk)
        return trunk

    @property
    def critics(self) -> list[nn.Module]:
        """The critic's own trunks, if it has any: one, or two of twins."""
        if not self.n_critics or self.inference_only:
            return []
        own: Any = self.critic
        return [own] if self.n_critics == 1 else list(own)

    def _make_value_head(self) -> None:
        hidden_size = self.policy.get_output_embeddings().weight.shape[1]
        self.value_head = self._new_value_head(hidden_size)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        seed, count = int(self.model_config.get("seed") or 0), max(self.n_critics, 1)
        if count > 1:
            draw_apart(self.value_head.weight, seed)
        if self.critic_observation in NUMBERS_FOR_CRITICS:
            outputs = self.n_value_outputs // count
            heads = [ObservationHead(hidden_size, outputs, seed + i) for i in range(count)]
            self.observation_head = heads[0] if count == 1 else nn.ModuleList(heads)
        if checkpoint := self.model_config.get("critic_checkpoint"):
            load_critic(self, checkpoint)

    def _new_value_head(self, n_inputs: int) -> nn.Linear:
        return nn.Linear(n_inputs, self.n_value_outputs)

    def shard(self, device: torch.device) -> None:
        """Shares the parameters out among all learners; from then on passes run in step."""
        self.sharding = Sharding(self, [self.policy, *self.critics], device, self.precision)

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Within it the module may run without gradients; all learners enter it at once."""
        return contextlib.nullcontext() if self.sharding is None else self.sharding.gathered()

    def differentiable(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A loss that ``compute`` makes of the module, on all learners at once."""
        return compute() if self.sharding is None else self.sharding.differentiable(compute)

    @contextlib.contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Another temperature of the sampling distribution for a while."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: dropout would make another policy than the sampler's."""
        return super().train(False)

    @property
    def n_value_outputs(self) -> int:
        """Outputs of the value head: one, the value."""
        return 1

    @property
    def has_critic(self) -> bool:
        """Whether this copy of the module carries a critic."""
        return hasattr(self, "value_head")

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters that only the critic uses."""
        names = "critic", "value_head", "observation_head"
        parts = [getattr(self, name) for name in names if hasattr(self, name)]
        return [parameter for part in parts for parameter in part.parameters()]

    def get_non_inference_attributes(self) -> list[str]:
        """What an env runner does without."""
        return ["critic", "value_head", "observation_head", "target_policy"]

    def get_state(self, *args: Any, inference_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state; for env runners the policy with its adapters merged in.

        These get the module's own memory where it lends it, and of merged weights in any case.
        """
        apart = self.lends_weights or self.lora is not None or self.sharding is not None
        if not inference_only or not apart:
            return super().get_state(*args, inference_only=inference_only, **kwargs)
        unread, state = {*self.get_non_inference_attributes()}, {}
        if self.lora is not None:
            unread.add("policy")
            merged = merged_state(self.policy)
            state |= {f"{POLICY_PREFIX}{name}": tensor for name, tensor in merged.items()}
        for name, part in self.named_children():
            if name not in unread:  # Of shards nothing is gathered that nobody reads.
                part.state_dict(destination=state, prefix=f"{name}.")
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        state |= {name: whole(tensor) for name, tensor in own if name not in unread}
        return {name: _as_array(tensor) for name, tensor in state.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over a state; on an env runner the arrays themselves, without a copy.

        What it has taken over may be the learner's, so nothing is written to it. Arrays that may
        not be written to lie in Ray's object store, which must not be kept full: these are copied.

        Raises:
            ValueError: on an env runner, for tensors that are missing or have another shape.
        """
        fixed = any(isinstance(x, np.ndarray) and not x.flags.writeable for x in state.values())
        if not self.inference_only or (fixed and not self._borrows):
            super().set_state(state)
            return
        own = {**dict(self.named_buffers(remove_duplicate=False)),
               **dict(self.named_parameters(remove_duplicate=False))}  # fmt: skip
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        given: Any = convert_to_torch_tensor(
            {name: state[name] for name in shapes.keys() & state.keys()}
        )
        check_names(given, shapes)
        for name, tensor in given.items():
            own[name].data = (tensor.clone() if fixed else tensor).to(own[name].dtype)
        self._borrows = not fixed

    def get_initial_state(self) -> dict[str, Any]:
        """A state of one number: it makes RLlib's connectors keep the time axis."""
        return {"position": torch.zeros(1)}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        sequences = self.sequences(batch)
        states = self.states(self.policy, sequences)
        outputs = {Columns.ACTION_DIST_INPUTS: self.sampled_tokens(self.policy, states, sequences)}
        if self.has_critic:
            outputs[Columns.EMBEDDINGS] = self.critic_states(sequences, states)
        return outputs

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Of prompts alone the most probable next tokens and the model's own logps of them."""
        if Columns.ACTIONS in batch:
            return super()._forward_inference(batch, **kwargs)
        return self._next_tokens(batch, greedy=True)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Of prompts alone next tokens drawn as the rollout draws them, and their logps."""
        if Columns.ACTIONS in batch:
            return super()._forward_exploration(batch, **kwargs)
        return self._next_tokens(batch, greedy=False)

    @torch.no_grad()
    def _next_tokens(self, batch: dict[str, Any], greedy: bool) -> dict[str, Any]:
        """``actions`` (B,) int64 and ``action_logp`` (B,) float32 after B prompts."""
        prompts = from_prompts(batch, self.policy)
        rollout = RolloutSettings.of(self.model_config).to_dict()
        settings = {**rollout, "temperature": self.temperature}
        params = SamplingParams.of(settings, 1, greedy=greedy)
        head = self.policy.get_output_embeddings()
        tokens = torch.zeros_like(prompts.prompt_lens)
        logps = torch.zeros_like(tokens, dtype=torch.float32)
        for index in self.micro_batches(prompts):
            states = self.states(self.policy, prompts.rows(index))[:, 0]
            logits = self.logit_map(head(states.to(head.weight.dtype)).float())
            uniforms = torch.rand(len(index), dtype=torch.float64, device=tokens.device)
            tokens[index], logps[index], _ = sample(logits, uniforms, params)
        return {Columns.ACTIONS: tokens, Columns.ACTION_LOGP: logps}

    @staticmethod
    def sequences(batch: dict[str, Any]) -> Sequences:
        """The token rows of a batch of either world."""
        return from_columns(batch) if INPUT_IDS in batch else from_incremental_obs(batch)

    def micro_batches(self, sequences: Sequences, budget: int | None = None) -> list[torch.Tensor]:
        """Cuts rows into micro-batches of at most ``budget`` tokens, by what is computed of them.

        Args:
            sequences: the rows.
            budget: tokens; None: the module's own ``micro_batch_tokens``.

        Returns:
            Index tensors that together hold every row once. Behind them, where parameters are
            sharded, the first row as often as another learner has more micro-batches.

        Raises:
            ValueError: if one row alone exceeds the budget.
        """
        parts = self._own_micro_batches(sequences, budget or self.micro_batch_tokens)
        return parts if self.sharding is None else self.sharding.in_step(parts)

    def _own_micro_batches(self, sequences: Sequences, budget: int) -> list[torch.Tensor]:
        if self.critic_observation == "text":
            sequences = sequences.behind_text  # the longer of the rows that are computed
        if not packs_rows(self.policy):
            return split_by_token_budget(sequences.lengths, budget)
        prompt = first_of_prompt(sequences.input_ids, sequences.prompt_lens)
        return split_packed(
            prompt,
            sequences.prompt_lens,
            sequences.lengths,
            budget,
            whole_rows=sequences.input_ids.device.type != "cpu",
        )

    def hidden(self, model: nn.Module, sequences: Sequences) -> torch.Tensor:
        """Last hidden states (B, S, H) of a policy or a trunk at every position of the rows.

        Of a policy what its LM head reads. Of packed rows without the place of the last token,
        which no completion token follows.
        """
        if not packs_rows(model):
            with autocast(self.precision, sequences.input_ids.device):
                return last_states(model, input_ids=sequences.input_ids, use_cache=False)
        return self._packed_hidden(model, sequences)[sequences.packing.rows]

    def _packed_hidden(self, model: nn.Module, sequences: Sequences) -> torch.Tensor:
        packing = sequences.packing
        with autocast(self.precision, packing.input_ids.device):
            states = last_states(
                model,
                input_ids=packing.input_ids.unsqueeze(0),
                position_ids=packing.positions.unsqueeze(0),
                use_cache=False,
                packing=packing,
            )
        return states.squeeze(0)

    def states(self, model: nn.Module, sequences: Sequences) -> torch.Tensor:
        """(B, T, H), the states before each completion token."""
        if not packs_rows(model):
            return sequences.states(self.hidden(model, sequences))
        return self._packed_hidden(model, sequences)[sequences.packed_states]

    def token_logps(
        self, policy: Any, states: torch.Tensor, tokens: torch.Tensor, factor: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logps and entropies (M,) of ``tokens`` (M,) after ``states`` (M, H) under a policy.

        At ``factor`` times the sampling temperature.
        """
        head = policy.get_output_embeddings()
        if self.precision == "bf16":
            states = states.bfloat16()
        return with_weights(
            head,
            lambda states: token_logps(
                states,
                head.weight,
                tokens,
                bias=head.bias,
                temperature=factor * self.temperature,
                logit_map=self.logit_map,
            ),
            states,
        )

    def sampled_tokens(
        self, policy: Any, states: torch.Tensor, sequences: Sequences, factor: float = 1.0
    ) -> torch.Tensor:
        """(B, T, 2): logp of each completion token and entropy, zeros where masked."""
        mask = sequences.mask
        logp, entropy = self.token_logps(policy, states[mask], sequences.actions[mask], factor)
        outputs = logp.new_zeros(*mask.shape, 2)
        outputs[mask] = torch.stack([logp, entropy], dim=-1)
        return outputs

    def head_gradient(self, states: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """(B, H), mean over completion tokens of the gradient of logp by their states (B, T, H).

        By what a plain head would give: scales and caps behind it are left out.
        """
        mask = sequences.mask
        head = self.policy.get_output_embeddings()
        each = with_weights(
            head,
            lambda states: score_by_hidden(
                states,
                head.weight,
                sequences.actions[mask],
                bias=head.bias,
                temperature=self.temperature,
                logit_map=self.logit_map,
            ),
            states[mask],
        )
        owner = mask.nonzero()[:, 0]
        sums = each.new_zeros(len(mask), each.shape[1]).index_add_(0, owner, each)
        return sums / mask.sum(1, keepdim=True).clamp(min=1)

    def of_policy(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, T, 2): logp of each completion token and entropy, with gradients, no critic asked.

        Under the sampling temperature; zeros where masked.
        """
        sequences = self.sequences(batch)
        return self.sampled_tokens(self.policy, self.states(self.policy, sequences), sequences)

    def compute_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, T) float32 logps of the completion tokens, in micro-batches, without gradients.

        Under the sampling temperature; zeros where masked.
        """
        sequences = self.sequences(batch)
        logps = torch.zeros(sequences.actions.shape, device=sequences.actions.device)
        with torch.no_grad(), self.gathered():
            for index in self.micro_batches(sequences):
                rows = sequences.rows(index)
                states = self.states(self.policy, rows)
                sampled = self.sampled_tokens(self.policy, states, rows)[..., 0]
                logps[index, : sampled.shape[1]] = sampled.float()
        return logps

    def critic_states(
        self, sequences: Sequences, policy_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, H) states for the value head, with what the critic alone is told behind them.

        Of twins both critics', one behind the other.
        """
        if self.n_critics:
            rows = self._as_critic_reads(sequences)
            parts = [self.states(trunk, rows) for trunk in self.critics]
        else:
            if policy_states is None:
                policy_states = self.states(self.policy, sequences)
            parts = [policy_states.detach() if self.critic_kind == "detached" else policy_states]
        if self.critic_observation in NUMBERS_FOR_CRITICS:
            told = sequences.observations
            if told is None:
                raise ValueError(self._not_told(CRITIC_OBSERVATIONS))
            parts = [ObservationHead.joined(states, told) for states in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _as_critic_reads(self, sequences: Sequences) -> Sequences:
        if self.critic_observation != "text":
            return sequences
        if sequences.text_ids is None:
            raise ValueError(self._not_told(CRITIC_TEXT_IDS))
        return sequences.behind_text

    def _not_told(self, column: str) -> str:
        return (
            f"critic_observation is {self.critic_observation!r}, but the batch has no {column}: "
            "its episodes come from an environment that does not tell them. Sample with "
            f"env_config = {{critic_observation = {self.critic_observation!r}}}, which our "
            "algorithms set by themselves."
        )

    def compute_values(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Values (B, T) of the states before each completion token.

        Without ``embeddings`` (RLlib's GAE connector) runs the critic in micro-batches and
        without gradients: the connector would run it at once and with them (Ray 2.60).
        """
        return self.value_outputs(batch, embeddings).squeeze(-1)

    def value_outputs(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Raw outputs of the value head (B, T, n_value_outputs), in its weights' float32."""
        if embeddings is not None:
            head, count = self.value_head, max(self.n_critics, 1)
            parts = embeddings.to(head.weight.dtype).chunk(count, dim=-1)
            of_each = zip(parts, head.weight.chunk(count), head.bias.chunk(count), strict=True)
            found = [linear(part[..., : head.in_features], w, b) for part, w, b in of_each]
            if self.critic_observation in NUMBERS_FOR_CRITICS:
                tell: Any = [self.observation_head] if count == 1 else self.observation_head
                found = [x + told(part) for x, told, part in zip(found, tell, parts, strict=True)]
            return found[0] if count == 1 else torch.cat(found, dim=-1)
        sequences = self.sequences(batch)
        outputs = sequences.actions.new_zeros(
            *sequences.actions.shape, self.n_value_outputs, dtype=self.value_head.weight.dtype
        )
        with torch.no_grad(), self.gathered():
            for index in self.micro_batches(sequences):
                rows = sequences.rows(index)
                values = self.value_outputs({}, self.critic_states(rows))
                outputs[index, : values.shape[1]] = values
        return outputs

    def make_target_networks(self) -> None:
        """A frozen copy of the policy, for APPO."""
        self.target_policy: Any = make_target_network(self.policy)

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The policy and its frozen copy."""
        return [(self.policy, self.target_policy)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Action distribution inputs (B, T, 2) of the frozen copy."""
        sequences = self.sequences(batch)
        states = self.states(self.target_policy, sequences)
        inputs = self.sampled_tokens(self.target_policy, states, sequences)
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: inputs}


def _as_array(tensor: torch.Tensor) -> Any:
    """As RLlib hands weights on, but of float32 on the CPU the same memory."""
    same = tensor.dtype == torch.float32 and tensor.dim()
    return tensor.detach().cpu().numpy() if same else convert_to_numpy(tensor)


class DistRLModule(CausalLMModule):
    """`CausalLMModule` with the law of the return in place of one value.

    Further ``model_config`` keys: ``head`` (a name or table; ``quantile`` without it), and of
    `[training]` ``n_quantiles``, ``head_center`` (``mean`` or ``median``), ``init_spread``.
    """

    def setup(self) -> None:
        """Loads the model, makes the critic, and starts its quantiles close together."""
        super().setup()
        if self.has_critic:
            self._read_range()
            self.register_load_state_dict_post_hook(self._read_range)
            loaded = bool(self.model_config.get("critic_checkpoint"))
            self.register_buffer("value_initialised", torch.tensor(loaded))
            if not loaded:
                self.initialise_values(0.0)
                self.value_initialised.fill_(False)

    @functools.cached_property
    def head(self) -> Head:
        """What makes laws, and losses, of the value head's raw outputs."""
        return make_head(self.model_config)

    @property
    def n_value_outputs(self) -> int:
        """Raw outputs of the value head, such as a centre and N - 1 gaps."""
        return self.head.n_outputs

    def _new_value_head(self, n_inputs: int) -> nn.Linear:
        """With the range of a head that takes it from data: checkpoints and critics hold it."""
        value_head = super()._new_value_head(n_inputs)
        if self.head.from_data:
            value_head.register_buffer(_RANGE, torch.tensor(self._range, dtype=torch.float64))
        return value_head

    @property
    def _range(self) -> tuple[float, float]:
        return self.head.support[0], self.head.support[-1]

    def fit_head(self, low: float, high: float) -> None:
        """Lets a head that takes its range from data lie over the returns from low to high."""
        self.head.fit(low, high)
        getattr(self.value_head, _RANGE).copy_(torch.tensor(self._range, dtype=torch.float64))

    def _read_range(self, *_: Any) -> None:
        """After weights were loaded: the head's range is what came with them."""
        if self.has_critic and self.head.from_data:
            self.head.fit(*getattr(self.value_head, _RANGE).tolist())

    def get_non_inference_attributes(self) -> list[str]:
        """What an env runner does without."""
        return [*super().get_non_inference_attributes(), "value_initialised"]

    def initialise_values(self, value: float) -> None:
        """Lets every state's law start around ``value``, in units of the return."""
        with torch.no_grad():
            bias = self.value_head.bias
            bias.copy_(share_of(self.head.start(value), bias))
            self.value_initialised.fill_(True)

    def compute_law(self, batch: dict[str, Any], embeddings: torch.Tensor | None = None) -> Law:
        """The law (B, T) of the return from the state before each token."""
        return self.head.law(self.value_outputs(batch, embeddings))

    def compute_quantiles(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ordered quantiles (B, T, N) of the return from the state before each token."""
        law = self.compute_law(batch, embeddings)
        return law.quantiles(int(self.model_config["n_quantiles"]))

    def compute_values(
        self, batch: dict[str, Any], embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean of the law (B, T): what RLlib's own pieces take as the value."""
        return self.compute_law(batch, embeddings).mean
