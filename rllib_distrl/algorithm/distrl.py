"""DistRL: PPO on a language model with a critic that knows the return distribution.

As in RLlib, the configuration and the algorithm that it builds are one file.
"""

import secrets
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.learner import LearnerConnectorPipeline
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.env_context import EnvContext
from ray.rllib.utils import from_config
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_distrl.algorithm.batches import Batches
from rllib_distrl.algorithm.cluster import check_cluster, exits_are_errors, why_no_runner_works
from rllib_distrl.algorithm.critic_pretraining import pretrain
from rllib_distrl.algorithm.estimates import largest_micro_batch
from rllib_distrl.algorithm.export import export_policy
from rllib_distrl.algorithm.restoring import (
    SETTINGS,
    WEIGHTS,
    check_restored,
    check_settings,
    module_settings,
    place_of,
    reading,
    saved_settings,
)
from rllib_distrl.algorithm.scaling import check_scale
from rllib_distrl.algorithm.sharded_learners import ShardedLearnerGroup
from rllib_distrl.algorithm.validation import (
    check_attributes,
    check_branching_fits,
    take_settings,
    validate_distrl,
)
from rllib_distrl.algorithm.weight_sync import MismatchWarning, WeightSync
from rllib_distrl.algorithm.wiring import env_settings, set_env_settings
from rllib_distrl.learner.connector import SequencesFromEpisodes
from rllib_distrl.learner.distrl_learner import TRAINING_ITERATION, DistRLLearner
from rllib_distrl.learner.step import REFUSED_IN_A_ROW, NonFiniteError
from rllib_distrl.method import registry
from rllib_distrl.method.allocators import ExploreFilterReplay, warn_of_rows_seen_once
from rllib_distrl.method.pipeline import Method
from rllib_distrl.model.causal_lm_module import DistRLModule
from rllib_distrl.model.loading import resolve
from rllib_distrl.recipe_schema import builder_parameters, check_names, take_builder_values
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from rllib_distrl.rollout.contract import check_contract, check_env, check_whole
from rllib_distrl.rollout.fleet import EnvRunnerFleet
from rllib_distrl.rollout.groups import Group, SampledGroups, shards_of
from rllib_distrl.settings import RolloutSettings, TrainingSettings, signature_of

PROMPT_SAMPLER = "prompt_sampler"
ALLOCATOR = "allocator"
OPEN_ROWS = "open_rows"
CRITIC_PRETRAINED = "critic_pretrained"
NUM_REPLAYED_EPISODES = "num_replayed_episodes"
WEIGHTS_PROBE_ERROR = "weights_probe_error"

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
    def lends_weights(self) -> bool:
        """Whether env runners of the learner's process hold its weights themselves, not a copy.

        Not where somebody may read them while it learns.
        """
        beside = self.evaluation_parallel_to_training or self.rollout_settings.max_staleness
        return self.num_learners == 0 and not beside

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        rollout = self.rollout_settings
        return {
            "critic": self.critic,
            "critic_checkpoint": self.critic_checkpoint,
            "critic_observation": self.critic_observation,
            "critic_freeze": self.critic_freeze,
            "head": self.head,
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
        return DistRLLearner

    def build_learner_group(
        self,
        *,
        env: Any = None,
        spaces: Any = None,
        rl_module_spec: Any = None,
        placement_group: Any = None,
    ) -> LearnerGroup:
        """RLlib's group of learners; with ``sharding`` one that asks all for their state."""
        spec = rl_module_spec or self.get_multi_rl_module_spec(env=env, spaces=spaces)
        group = LearnerGroup if self.sharding == "none" else ShardedLearnerGroup
        return group(config=self.copy(), module_spec=spec, placement_group=placement_group)

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

        Without a seed one is drawn here, so that every process has the same, and a number takes
        the place of ``micro_batch_tokens = "auto"``.

        Raises:
            ValueError: with what was got, what is allowed and what to do.
        """
        check_attributes(self)
        take_builder_values(self, leave=TrainingSettings.model_fields)
        check_contract(self, ours=True)
        take_settings(self)
        super().validate()
        validate_distrl(self)
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        settings = env_settings(self.model_config["model"], self.rollout_settings, "token")
        if self.critic_observation != "none" or "critic_observation" in self.env_config:
            settings["critic_observation"] = self.critic_observation
        imitates = Method.from_config(self).imitates
        if imitates or "demonstrations" in self.env_config:
            settings["demonstrations"] = imitates
        set_env_settings(self, settings)
        if self.micro_batch_tokens == "auto":
            self.micro_batch_tokens = largest_micro_batch(self)


class DistRL(Algorithm):
    """One iteration: serve prompts, sample whole groups, update, sync weights, verify.

    Attributes:
        prompt_sampler: chooses the prompts of all runners.
        allocator: shares an iteration's completions out among its prompts.
        between_iterations: whether the state is that of a whole iteration, fit to be saved.
    """

    config: Any
    learner_group: Any
    env_runner_group: Any

    def __init__(self, config: Any = None, *args: Any, **kwargs: Any):
        """RLlib's, which lets ``from_checkpoint`` fall back to a class without its settings.

        Raises:
            ValueError: without a configuration.
        """
        if config is None:
            raise ValueError(
                f"{type(self).__name__} got no configuration. If this is from_checkpoint: the "
                "settings in the checkpoint are of another version and cannot be read. Give them, "
                "from_checkpoint(PATH, config=CONFIG); its weights and state are kept. "
                "`distrl train RUN --resume` does it by itself."
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def get_default_config(cls) -> DistRLConfig:
        """`DistRLConfig`."""
        return DistRLConfig()

    def setup(self, config: Any) -> None:
        """Builds runners and learners, and the prompt sampler that the driver owns.

        Raises:
            RuntimeError: no env runner starts, or code of the user's called ``sys.exit``.
        """
        with exits_are_errors("building the algorithm"):
            self._build(config)

    def _build(self, config: Any) -> None:
        resolve(self.config.model_config["model"])
        check_cluster(self.config)
        n_rows = self._check_task()
        sampler = registry.resolve(PROMPT_SAMPLER, self.config.prompt_sampler)
        self.prompt_sampler = sampler(n_rows, self.config.seed)
        allocator = registry.resolve(ALLOCATOR, self.config.allocator)
        self.allocator = allocator(self.config.rollout_settings.num_generations, self.config.seed)
        self._allocator_name = allocator.name
        warn_of_rows_seen_once(allocator, sampler, n_rows)
        self._critic_pretrained = self.config.critic_pretraining is None
        self._refused_in_a_row = 0
        self._warn_of_mismatch = MismatchWarning(self.config)
        # Another thread that scales waits for the end of the iteration.
        self._scaling = threading.RLock()
        try:
            super().setup(config)
        except IndexError as error:
            self._explain_dead_runners(error)
            raise
        self._sync_weights()
        evaluation: Any = self.eval_env_runner
        if evaluation is not None:
            evaluation.share_engine(self.env_runner, self.weight_sync.latest[0])
        self.between_iterations = True

    @cached_property
    def weight_sync(self) -> WeightSync:
        """The runners, and the policy that they sample with.

        Made when it is first asked for: `on_algorithm_init` may restore a checkpoint before `setup`
        is done.
        """
        return WeightSync(self.learner_group, self.env_runner_group, self.config, self.trial_id)

    @cached_property
    def batches(self) -> Batches:
        """What runners are sampling."""
        return Batches(self.weight_sync, self.prompt_sampler, self.allocator, self.config)

    @property
    def fleet(self) -> EnvRunnerFleet:
        """The remote runners."""
        return self.weight_sync.fleet

    def _check_task(self) -> int:
        """The task's number of rows; makes the env here, where its errors reach the user whole."""
        env: Any = self.env_creator(EnvContext(self.config.env_config, worker_index=0))
        inner = check_env(env)
        check_whole(env)
        check_branching_fits(self.config, inner)
        env.reset(options={"row": 0})
        n_rows = len(inner.task)
        env.close()
        return n_rows

    def _explain_dead_runners(self, error: IndexError) -> None:
        """Raises what kept all remote runners from starting, if that was it."""
        config = self.evaluation_config or self.config
        if config.num_env_runners and (why := why_no_runner_works(config)):
            raise RuntimeError(f"No env runner starts. {why}") from error

    def train(self) -> dict[str, Any]:
        """One iteration, with RLlib's evaluation and callbacks.

        Raises:
            RuntimeError: code of the user's called ``sys.exit``, which would end the job in
                silence.
        """
        with exits_are_errors("training"):
            return super().train()

    def training_step(self) -> None:
        """Samples, learns and syncs once; the first time the critic may learn beforehand.

        With ``max_staleness`` the runners sample the next batches while the learner learns.
        An error before the learners start leaves the state as the last iteration left it, and
        ``between_iterations`` true: such a state may be saved and trained on.

        Raises:
            NonFiniteError: when the learners refused too many steps in a row, or rewards or
                logps are not finite.
            RunnersLostError: when the batch could not be completed.
        """
        with self._scaling:
            self._check_refusals()
            self._take_over_foreign_weights()
            self._pretrain_critic()
            batch = self.sample_groups()
            self.between_iterations = False
            self.batches.take_results(batch.prompt_results())
            overlap = self.config.rollout_settings.max_staleness > 0
            if overlap:
                with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                    self.weight_sync.send()
                    self.fleet.admit()
                self.batches.start()
            self.update_learners([*batch.groups, *batch.explored, *self._replayed(batch)])
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self.weight_sync.fetch()
                if not overlap:
                    self.weight_sync.send()
            self.between_iterations = True

    def _check_refusals(self) -> None:
        """Stops where the state is whole: before the iteration after the one that failed."""
        if self._refused_in_a_row < self.config.max_nonfinite_steps:
            return
        results = self.learner_group.foreach_learner(lambda learner: learner.last_refusal)
        raise NonFiniteError(
            f"{self._refused_in_a_row} optimiser steps in a row were refused, the last one "
            f"because this is not finite: {results.result_or_errors[0].get()}. The weights are "
            "those before the first of them. Lower lr or set grad_clip; "
            "max_nonfinite_steps says how many are tolerated."
        )

    def _take_over_foreign_weights(self) -> None:
        """Syncs what somebody has put into the learners' modules since the last sync."""
        if self.weight_sync.fetch_foreign():
            self.batches.drop()
            self.weight_sync.send()

    def _pretrain_critic(self) -> None:
        if not self._critic_pretrained:
            pretrain(self, self.batches)
            self._critic_pretrained = True

    def sample_groups(self) -> SampledGroups:
        """The batch of an iteration, whole groups; its metrics and counts are logged."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            batch, counts = self.batches.next(self.iteration + 1)
            self.metrics.aggregate(batch.metrics, key=ENV_RUNNER_RESULTS)
            counts |= {
                WEIGHTS_PROBE_ERROR: self.weight_sync.check_probes.error,
                **self.fleet.take_counts(),
            }
            for name, count in counts.items():
                self.metrics.log_value((ENV_RUNNER_RESULTS, name), count, window=1)
        return batch

    def _replayed(self, batch: SampledGroups) -> list[Group]:
        """Groups of earlier iterations that are learned from again, if the allocator keeps any."""
        if not isinstance(self.allocator, ExploreFilterReplay):
            return []
        sampled, size = [*batch.groups, *batch.explored], batch.n_episodes()
        replayed = self.allocator.replay(sampled, size)
        count = sum(map(len, replayed))
        self.metrics.log_value((ENV_RUNNER_RESULTS, NUM_REPLAYED_EPISODES), count, window=1)
        return replayed

    def update_learners(self, groups: list[Group]) -> None:
        """Lets the learners learn from whole groups, as many for each; logs what they report."""
        steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        learners = self.config.num_learners
        # One reference per learner keeps episodes and groups whole: given episodes, Ray 2.60
        # cuts them in the middle (utils/minibatch_utils.py, ShardEpisodesIterator).
        batch = (
            {"episodes_refs": shards_of(groups, learners)}
            if learners > 1
            else {"episodes": [episode for group in groups for episode in group]}
        )
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            results = self.learner_group.update(
                **batch,
                timesteps={
                    NUM_ENV_STEPS_SAMPLED_LIFETIME: steps,
                    TRAINING_ITERATION: self.iteration + 1,
                },
                num_epochs=self.config.num_epochs,
                minibatch_size=self.config.minibatch_size,
                shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
            )
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
        found = (LEARNER_RESULTS, DEFAULT_MODULE_ID)
        self._warn_of_mismatch(self.metrics.peek((*found, "logp_mismatch_p95")))
        self._refused_in_a_row = int(self.metrics.peek((*found, REFUSED_IN_A_ROW)))

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Lets runners that have come up into service; training does not wait for the others."""
        if env_runner_group is not self.env_runner_group:
            return super().restore_env_runners(env_runner_group)
        with self._scaling:
            # While batches are under way, their weights may no longer be the learner's: runners are
            # admitted when the first one is finished.
            return [] if self.batches.under_way else self.fleet.admit()

    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """RLlib's evaluation, once more if all of its runners were lost in the middle of it."""
        results = super().evaluate(parallel_train_future)
        group = self.eval_env_runner_group
        if group is None or not group.num_remote_env_runners():
            return results
        if group.num_healthy_remote_env_runners():
            return results
        return super().evaluate(parallel_train_future)  # waits for one to come back

    def scale_env_runners(self, n: int) -> None:
        """Asks Ray for env runners, or stops some, so that there are ``n`` remote ones.

        Returns at once. New runners sample as soon as they are up and have confirmed version
        and hash of the present weights; runners are only stopped between iterations.

        Args:
            n: remote runners; 0 samples in this process, where it was built for that.

        Raises:
            ValueError: more than [rollout] max_env_runners, or than the cluster can hold.
        """
        check_scale(self.config, n)
        with self._scaling:
            self.batches.drain()
            self.fleet.scale(n)

    def _sync_weights(self) -> None:
        """Sends the policy to all runners, which prove that they have it."""
        self.weight_sync.fetch()
        self.weight_sync.send()

    def export_model(self, path: str | Path) -> None:
        """Writes the policy as a plain Hugging Face folder."""
        export_policy(self, path)

    def cleanup(self) -> None:
        """Stops everything, also runners that do not answer."""
        self.fleet.stop()
        super().cleanup()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, the prompt sampler's behind the last batch learned, what is checked.

        With ``segment_tokens`` also what was sampled and is not learned from yet.
        """
        state = super().get_state(*args, **kwargs)
        if self.config.rollout_settings.segment_tokens:
            state[OPEN_ROWS] = self.batches.get_state()
        state[PROMPT_SAMPLER] = self.batches.prompts_learned
        state[ALLOCATOR] = {self._allocator_name: self.allocator.get_state()}
        state[SETTINGS] = module_settings(self.config)
        state[WEIGHTS] = self.weight_sync.contents()
        state[CRITIC_PRETRAINED] = self._critic_pretrained
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``, of this algorithm or another one of the same model.

        Raises:
            ValueError: for a state of another model or critic, with the difference, or of other
                prompts.
        """
        check_settings(self.config, state.get(SETTINGS, {}), "The state")
        self.batches.drop()
        if PROMPT_SAMPLER in state:  # First: they may refuse.
            before = self.batches.get_state()
            self.batches.set_state(state.get(OPEN_ROWS, {}))
            try:
                self.prompt_sampler.set_state(state[PROMPT_SAMPLER])
            except Exception:
                self.batches.set_state(before)
                raise
        # What another allocator has learned means something else: this one starts anew.
        if self._allocator_name in state.get(ALLOCATOR, {}):
            self.allocator.set_state(state[ALLOCATOR][self._allocator_name])
        super().set_state(state)
        self._refused_in_a_row = 0
        self._restored_weights = state.get(WEIGHTS)
        self._critic_pretrained = state.get(CRITIC_PRETRAINED, self._critic_pretrained)
        if COMPONENT_LEARNER_GROUP in state:
            self._sync_weights()

    def set_weights(self, weights: dict[str, Any]) -> None:
        """Takes over the weights that another algorithm's ``get_weights`` has given.

        RLlib's own also calls a method of its env runners that has been removed (Ray 2.60).
        """
        learner = {COMPONENT_LEARNER: {COMPONENT_RL_MODULE: weights}}
        self.set_state({COMPONENT_LEARNER_GROUP: learner})

    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Restores a checkpoint, also into an algorithm that has trained further.

        Raises:
            ValueError: for a checkpoint of another model or critic, with the difference, and for
                one that cannot be read.
            RuntimeError: when the learners have not taken it over.
        """
        whole, filesystem = kwargs.get("component") is None, kwargs.get("filesystem")
        path = place_of(path, filesystem)
        if whole:
            saved = saved_settings(path, filesystem, self.STATE_FILE_NAME)
            check_settings(self.config, saved, f"The checkpoint {path}")
        self.batches.drop()
        self._restored_weights = None
        with reading(path):
            super().restore_from_path(path, *args, **kwargs)
        self._sync_weights()
        check_restored(path, self._restored_weights, self.weight_sync.contents())
        self.between_iterations = whole
