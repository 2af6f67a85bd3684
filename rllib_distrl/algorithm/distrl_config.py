"""The configuration of DistRL: RLlib's builder methods and names, and the method's own."""

import secrets
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import BaseModel
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.learner import LearnerConnectorPipeline
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils import from_config

from rllib_distrl.algorithm.distrl_validation import validate_distrl
from rllib_distrl.algorithm.wiring import (
    env_settings,
    set_env_settings,
)
from rllib_distrl.learner.connector import SequencesFromEpisodes
from rllib_distrl.model.distrl_module import DistRLModule
from rllib_distrl.recipe_schema import builder_parameters, check_names, check_value, nearest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.contract import check_contract
from rllib_distrl.settings import RolloutSettings, TrainingSettings, as_lists, signature_of

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

    if TYPE_CHECKING:  # The fields of `TrainingSettings` are attributes, as RLlib's settings are.

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, algo_class: type | None = None):
        """Starts from the method's defaults."""
        from rllib_distrl.algorithm.distrl import DistRL

        super().__init__(algo_class=algo_class or DistRL)
        self._rollout: dict[str, Any] = {}
        self._env_settings: dict[str, Any] = {}  # what `validate` has put into env_config
        self._set_runner_defaults()
        for name, value in TrainingSettings.defaults().items():
            setattr(self, name, value)
        # RLlib's settings, for an update on sequences.
        self.gamma = 1.0
        self.lr = 1e-5
        self.grad_clip = 1.0
        self.grad_clip_by = "global_norm"
        self.num_epochs = 1
        self.minibatch_size = None

    def _set_runner_defaults(self) -> None:
        self.env_runner_cls = CompletionEnvRunner
        self.num_env_runners = 0
        # Runners have no connector states to merge after every iteration.
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.sample_timeout_s = SAMPLE_TIMEOUT_S
        self.num_consecutive_env_runner_failures_tolerance = FAILURES_TOLERANCE
        self.evaluation_unhealthy_workers_timeout_s = EVALUATION_WAIT_S

    def training(self, **settings: Any) -> Self:
        """Sets the method: the fields of `TrainingSettings`; others are RLlib's own.

        Of RLlib's, ``lr``, ``gamma``, ``grad_clip``, ``num_epochs`` and ``minibatch_size`` (which
        counts sequences here) are read.

        Returns:
            This config.

        Raises:
            ValueError: for a name that is neither ours nor RLlib's.
        """
        check_names("training()", settings, builder_parameters(self, "training"))
        ours = TrainingSettings.model_fields.keys() & settings.keys()
        super().training(**{name: settings[name] for name in settings.keys() - ours})
        for name in ours:
            if settings[name] is not from_config.NotProvided:
                setattr(self, name, settings[name])
        return self

    training.__signature__ = signature_of(TrainingSettings)  # type: ignore[attr-defined]

    def rollout(self, **settings: Any) -> Self:
        """Sets how completions are sampled: the fields of `RolloutSettings`.

        Returns:
            This config.

        Raises:
            ValueError: for a field that does not exist.
        """
        check_names("rollout()", settings, RolloutSettings.model_fields)
        self._rollout = {**self._rollout, **settings}
        return self

    @property
    def rollout_settings(self) -> RolloutSettings:
        """How completions are sampled, checked; `rollout` sets it.

        The values are kept as they were given, where Ray Tune finds what it is to search.
        """
        return RolloutSettings(**self._rollout)

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
        from rllib_distrl.learner.distrl_learner import DistRLLearner

        return DistRLLearner

    def build_learner_connector(
        self, input_observation_space: Any, input_action_space: Any, device: Any = None
    ) -> LearnerConnectorPipeline:
        """The pipeline from episodes to the train batch.

        As with RLlib's defaults, the pieces of ``training(learner_connector=...)`` come first,
        where they may change the episodes, and `SequencesFromEpisodes` makes the batch of these.
        Pieces that change the batch follow a `SequencesFromEpisodes` of their own:
        ``lambda obs, act: [SequencesFromEpisodes(obs, act), MyConnector(obs, act)]``.
        """
        custom = self.copy(copy_frozen=False)
        custom.add_default_connectors_to_learner_pipeline = False
        pipeline: Any = AlgorithmConfig.build_learner_connector(
            custom, input_observation_space, input_action_space, device
        )
        if not any(isinstance(piece, SequencesFromEpisodes) for piece in pipeline.connectors):
            if not self.add_default_connectors_to_learner_pipeline:
                raise ValueError(
                    "add_default_connectors_to_learner_pipeline is False, and learner_connector "
                    "has no SequencesFromEpisodes, which makes the batch. Add it, or leave "
                    "add_default_connectors_to_learner_pipeline out."
                )
            pipeline.append(SequencesFromEpisodes(input_observation_space, input_action_space))
        return pipeline

    def validate(self) -> None:
        """Checks everything that can be checked before anything starts.

        Without a seed one is drawn here, so that every process has the same.

        Raises:
            ValueError: with what was got, what is allowed and what to do.
        """
        check_contract(self, ours=True)
        _check_attributes(self)
        take_settings(self)
        super().validate()
        validate_distrl(self)
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        settings = env_settings(self.model_config["model"], self.rollout_settings, "token")
        set_env_settings(self, settings)


def _check_attributes(config: DistRLConfig) -> None:
    """Refuses what `update_from_dict` and plain assignments have added: nobody reads it."""
    known = vars(type(config)())
    # RLlib leaves `class` behind when it copies a configuration (Ray 2.60).
    for name in vars(config).keys() - known.keys() - {"class"}:
        if name.startswith("__"):  # Tune's own, such as `__stderr_file__`.
            continue
        if name in RolloutSettings.model_fields:
            hint = f"Use rollout({name}=...)."
        else:
            hint = f"Did you mean {nearest(name, known)!r}?"
        raise ValueError(f"The configuration has no setting {name!r}. {hint}")


def take_settings(config: DistRLConfig) -> None:
    """Checks the types and bounds of ``config``'s settings and makes Python's values of them.

    Raises:
        ValueError: for the first one that is refused.
    """
    given = {name: getattr(config, name) for name in TrainingSettings.model_fields}
    checked = TrainingSettings(**given)
    for name in given:
        value = getattr(checked, name)
        if not isinstance(value, BaseModel):
            setattr(config, name, value)
    annotations = builder_parameters(config, "training")
    for name in ("lr", "gamma", "grad_clip", "num_epochs", "minibatch_size"):
        value = getattr(config, name)
        value = as_lists(value.item() if isinstance(value, np.generic) else value)
        setattr(config, name, value)
        if value is not None:
            check_value(f"training.{name}", value, annotations[name])
