"""The configuration of DistRL: RLlib's builder methods and names, and the method's own."""

from typing import Any, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils import from_config

from rllib_distrl.algorithms.distrl_validation import validate_distrl
from rllib_distrl.algorithms.language_model import env_settings
from rllib_distrl.algorithms.rollout_settings import RolloutSettings
from rllib_distrl.connectors.sequences_from_episodes import SequencesFromEpisodes
from rllib_distrl.env_runners.completion_env_runner import CompletionEnvRunner
from rllib_distrl.modules.causal_lm_module import DEFAULT_MICRO_BATCH_TOKENS
from rllib_distrl.modules.distrl_module import DistRLModule

# RLlib's mark of a setting that the caller left out; a default for parameters of any type.
NotProvided: Any = from_config.NotProvided
# Long generations take their time; RLlib's 60 s would drop them silently.
SAMPLE_TIMEOUT_S = 1_800.0
# Tries in a row to complete a batch, each of which waits for a runner if there is none.
FAILURES_TOLERANCE = 10
# RLlib would skip an evaluation whose runner is just being restarted.
EVALUATION_WAIT_S = 120.0


class DistRLConfig(AlgorithmConfig):
    """Configures DistRL.

    The model is named in ``rl_module(model_config={"model": ...})``, sampling in
    ``rollout(...)``, the method in ``training(...)``:

    >>> config = (
    ...     DistRLConfig()
    ...     .environment("distrl_envs:distrl/Countdown-v0")
    ...     .rl_module(model_config={"model": "builtin:countdown-tiny"})
    ...     .rollout(prompts_per_iteration=4, num_generations=2, max_completion_tokens=24)
    ... )
    >>> config.n_quantiles
    16
    """

    def __init__(self, algo_class: type | None = None):
        """Starts from the method's defaults."""
        from rllib_distrl.algorithms.distrl import DistRL

        super().__init__(algo_class=algo_class or DistRL)
        self.rollout_settings = RolloutSettings()
        self._set_runner_defaults()
        # RLlib's names, for an update on sequences.
        self.gamma = 1.0
        self.lambda_ = 0.95
        self.lr = 1e-5
        self.clip_param = 0.2
        self.clip_param_high: float | None = None
        self.dual_clip: float | None = None
        self.vf_loss_coeff = 1.0
        self.vf_clip_param = 10.0
        self.entropy_coeff = 0.0
        self.grad_clip = 1.0
        self.grad_clip_by = "global_norm"
        self.num_epochs = 1
        self.minibatch_size = None
        self.importance_correction = "none"
        self.importance_bound = 2.0
        self.micro_batch_tokens = DEFAULT_MICRO_BATCH_TOKENS
        self.max_nonfinite_steps = 3
        self.max_sampling_rounds = 1
        self.precision = "fp32"
        self.activation_checkpointing = False
        self.lr_schedule = "constant"
        self.lr_warmup_iterations = 0
        self.lr_decay_iterations: int | None = None
        self.lr_min_ratio = 0.0
        self.aggregation = "token_mean"
        # The quantile critic.
        self.critic = "separate"
        self.critic_checkpoint: str | None = None
        self.critic_lr: float | None = None
        self.critic_warmup_iterations = 0
        self.critic_pretraining: dict[str, Any] | None = None
        self.n_quantiles = 16
        self.quantile_huber_kappa = 0.1
        self.quantile_loss = "pairwise"
        self.target = "comonotone"
        self.critic_lambda = 0.95
        self.head_center = "mean"
        self.init_spread = 0.1
        self.init_value: float | None = None
        self.read_out: dict[str, Any] = {"name": "mean"}
        # Optimism.
        self.bonus_coeff = 3.0
        self.bonus_stat = "ltv_sqrt"
        self.bonus_at = "next"
        self.bonus_center = True
        self.bonus_schedule = "dltv"
        self.bonus_horizon: int | None = None
        self.bonus_max_ratio: float | None = 0.5
        self.ensemble: dict[str, Any] = {}
        self.distance: dict[str, Any] = {}
        self.whiten_advantages = True
        # Stages by name, see `rllib_distrl.stages`.
        self.reward_transforms: list[dict[str, Any]] = []
        self.advantage: dict[str, Any] = {"name": "gae"}
        self.shapers: list[dict[str, Any]] = []
        self.policy_loss: dict[str, Any] = {"name": "clip"}
        self.regularisers: list[dict[str, Any]] = []
        self.controllers: list[dict[str, Any]] = []
        self.prompt_sampler: dict[str, Any] = {"name": "without_replacement"}

    def _set_runner_defaults(self) -> None:
        self.env_runner_cls = CompletionEnvRunner
        self.num_env_runners = 0
        # Runners have no connector states to merge after every iteration.
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.sample_timeout_s = SAMPLE_TIMEOUT_S
        self.num_consecutive_env_runner_failures_tolerance = FAILURES_TOLERANCE
        self.evaluation_unhealthy_workers_timeout_s = EVALUATION_WAIT_S
        self.add_default_connectors_to_learner_pipeline = False
        self._learner_connector = _sequences_from_episodes

    def training(
        self,
        *,
        lambda_: float = NotProvided,
        clip_param: float = NotProvided,
        clip_param_high: float | None = NotProvided,
        dual_clip: float | None = NotProvided,
        vf_loss_coeff: float = NotProvided,
        vf_clip_param: float = NotProvided,
        entropy_coeff: float = NotProvided,
        importance_correction: str = NotProvided,
        importance_bound: float = NotProvided,
        micro_batch_tokens: int = NotProvided,
        max_nonfinite_steps: int = NotProvided,
        max_sampling_rounds: int = NotProvided,
        precision: str = NotProvided,
        activation_checkpointing: bool = NotProvided,
        lr_schedule: str = NotProvided,
        lr_warmup_iterations: int = NotProvided,
        lr_decay_iterations: int | None = NotProvided,
        lr_min_ratio: float = NotProvided,
        aggregation: str = NotProvided,
        critic: str = NotProvided,
        critic_checkpoint: str | None = NotProvided,
        critic_lr: float | None = NotProvided,
        critic_warmup_iterations: int = NotProvided,
        critic_pretraining: dict[str, Any] | None = NotProvided,
        n_quantiles: int = NotProvided,
        quantile_huber_kappa: float = NotProvided,
        quantile_loss: str = NotProvided,
        target: str = NotProvided,
        critic_lambda: float = NotProvided,
        head_center: str = NotProvided,
        init_spread: float = NotProvided,
        init_value: float | None = NotProvided,
        read_out: dict[str, Any] = NotProvided,
        bonus_coeff: float = NotProvided,
        bonus_stat: str = NotProvided,
        bonus_at: str = NotProvided,
        bonus_center: bool = NotProvided,
        bonus_schedule: str = NotProvided,
        bonus_horizon: int | None = NotProvided,
        bonus_max_ratio: float | None = NotProvided,
        ensemble: dict[str, Any] = NotProvided,
        distance: dict[str, Any] = NotProvided,
        whiten_advantages: bool = NotProvided,
        reward_transforms: list[dict[str, Any]] = NotProvided,
        advantage: dict[str, Any] = NotProvided,
        shapers: list[dict[str, Any]] = NotProvided,
        policy_loss: dict[str, Any] = NotProvided,
        regularisers: list[dict[str, Any]] = NotProvided,
        controllers: list[dict[str, Any]] = NotProvided,
        prompt_sampler: dict[str, Any] = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets the method; what is not named here goes to RLlib's own ``training``.

        Args:
            lambda_: of the actor's advantages.
            clip_param: half width of the clip band of the ratio.
            clip_param_high: upper half width, if it differs.
            dual_clip: bound on the ratio where the advantage is negative; None: off.
            vf_loss_coeff: weight of the critic's loss.
            vf_clip_param: bound on the squared error of a scalar critic (one quantile).
            entropy_coeff: weight of the entropy bonus, in nats.
            importance_correction: what is done about a sampler that is not the learner's policy
                (another engine or type, stale weights, top-p, top-k): ``none``, ``truncated`` or
                ``masked`` importance weights.
            importance_bound: C > 1: weights are cut at C, or masked outside of [1/C, C].
            micro_batch_tokens: tokens, shared prompts once, in one forward and backward pass.
            max_sampling_rounds: above 1, groups whose returns are all equal are sampled anew with
                other prompts, in so many rounds at most (DAPO's dynamic sampling).
            max_nonfinite_steps: optimiser steps in a row that may be refused because their loss
                or gradient is not finite; then training stops.
            precision: ``fp32``, or ``bf16``: autocast with float32 weights and logits.
            activation_checkpointing: whether the backward pass runs each block once more
                instead of keeping its activations.
            lr_schedule: ``constant`` or ``cosine``, of both learning rates.
            lr_warmup_iterations: iterations over which they rise linearly.
            lr_decay_iterations: iteration at which ``cosine`` ends.
            lr_min_ratio: where it ends, as a share of the learning rate.
            aggregation: ``token_mean``, ``sequence_mean`` or ``constant``.
            critic: ``separate``, ``shared``, ``detached`` or ``none``.
            critic_checkpoint: folder written by ``distrl export --critic`` to start a separate
                critic from; None: a copy of the policy's trunk.
            critic_lr: learning rate of the critic's own parameters; None: ``lr``.
            critic_warmup_iterations: iterations in which only the critic learns.
            critic_pretraining: the fields of `learners.pretraining.PretrainingSettings`, such as
                ``{rollouts = 8192}``; its tokens count as sampled. None: none.
            n_quantiles: N; 1 is a scalar critic with RLlib's own value loss.
            quantile_huber_kappa: width of the quadratic part, in units of the return.
            quantile_loss: ``pairwise`` or ``matched``.
            target: ``comonotone`` (D-GAE), ``mixture``, ``sample_replacement``,
                ``monte_carlo``.
            critic_lambda: lambda of the critic's targets.
            head_center: what the centre of the head is: ``mean`` or ``median``.
            init_spread: distance of the outermost quantiles at the start.
            init_value: value of all states at the start; None: the first batch's mean return.
            read_out: ``{name, level}`` of the quantiles that the actor takes as the value.
            bonus_coeff: c of the optimism bonus; 0 switches it off.
            bonus_stat: ``ltv_sqrt``, ``ltv`` or ``std`` of the quantiles; ``ensemble``
                (disagreement of small critics) or ``distance`` (of the policy's features from
                those seen).
            bonus_at: ``next``, ``difference`` or ``current``.
            bonus_center: whether the bonus is centred per position.
            bonus_schedule: ``dltv``, ``linear`` or ``constant``.
            bonus_horizon: iterations until a linear schedule reaches zero.
            bonus_max_ratio: cap of std(bonus) / std(advantage); None: no cap.
            ensemble: the fields of `learners.uncertainty.EnsembleSettings`, such as
                ``{size = 8, prior_scale = 0.3}``.
            distance: the fields of `learners.uncertainty.DistanceSettings`.
            whiten_advantages: whether advantages are standardised over the batch.
            reward_transforms: stages applied to the rewards, in order.
            advantage: ``{name, ...}`` of the advantage estimator.
            shapers: stages applied to the advantages, in order, before whitening.
            policy_loss: ``{name, ...}`` of the token loss.
            regularisers: stages added to the token loss, such as ``kl`` to the reference.
            controllers: stages that move a coefficient between iterations.
            prompt_sampler: ``{name, ...}`` of what chooses each iteration's prompts.
            **kwargs: RLlib's: ``lr``, ``gamma``, ``grad_clip``, ``num_epochs``,
                ``minibatch_size`` (counts sequences here) and so on.

        Returns:
            This config.
        """
        ours = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "kwargs", "__class__")
        }
        super().training(**kwargs)
        for name, value in ours.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self

    def rollout(self, **settings: Any) -> Self:
        """Sets how completions are sampled: the fields of `RolloutSettings`.

        Raises:
            ValueError: for a field that does not exist.
        """
        known = self.rollout_settings.to_dict()
        unknown = set(settings) - set(known)
        if unknown:
            raise ValueError(f"rollout() got {sorted(unknown)}; it takes {', '.join(known)}.")
        self.rollout_settings = RolloutSettings(**{**known, **settings})
        return self

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        rollout = self.rollout_settings
        return {
            "critic": self.critic,
            "critic_checkpoint": self.critic_checkpoint,
            "n_quantiles": self.n_quantiles,
            "head_center": self.head_center,
            "init_spread": self.init_spread,
            "micro_batch_tokens": self.micro_batch_tokens,
            "precision": self.precision,
            "activation_checkpointing": self.activation_checkpointing,
            "temperature": rollout.temperature,
            "seed": self.seed,
            "rollout": rollout.to_dict(),
        }

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """`DistRLModule`."""
        return RLModuleSpec(module_class=DistRLModule)

    def get_default_learner_class(self) -> type:
        """`DistRLLearner`."""
        from rllib_distrl.learners.distrl_learner import DistRLLearner

        return DistRLLearner

    def validate(self) -> None:
        """Checks everything that can be checked before anything starts.

        Raises:
            ValueError: with what was got, what is allowed and what to do.
        """
        super().validate()
        validate_distrl(self)
        self.env_config = {
            **self.env_config,
            **env_settings(self.model_config["model"], self.rollout_settings, "token"),
        }


def _sequences_from_episodes(observation_space: Any, action_space: Any) -> SequencesFromEpisodes:
    return SequencesFromEpisodes(observation_space, action_space)
