"""DistRL: PPO on a language model with a critic that knows the return distribution."""

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_distrl.algorithm.cluster import check_cluster, why_no_runner_starts
from rllib_distrl.algorithm.critic_pretraining import pretrain
from rllib_distrl.algorithm.distrl_config import DistRLConfig
from rllib_distrl.algorithm.dynamic_sampling import sample_informative
from rllib_distrl.algorithm.fresh_batches import FreshBatches
from rllib_distrl.algorithm.learner_shards import update_learners
from rllib_distrl.algorithm.probe_check import MismatchWarning, ProbeCheck
from rllib_distrl.algorithm.restoring import (
    SETTINGS,
    WEIGHTS,
    check_restored,
    check_settings,
    module_settings,
    saved_settings,
)
from rllib_distrl.algorithm.sampling import (
    SampledGroups,
    check_weights,
    prompt_results,
)
from rllib_distrl.algorithm.wiring import export_policy, runner_weights
from rllib_distrl.learner.distrl_learner import TRAINING_ITERATION
from rllib_distrl.learner.refusals import REFUSED_IN_A_ROW, NonFiniteError
from rllib_distrl.method import registry
from rllib_distrl.model.loading import resolve
from rllib_distrl.rollout.contract import check_env, check_whole
from rllib_distrl.rollout.fleet import EnvRunnerFleet
from rllib_distrl.rollout.scaling import check_scale

PROMPT_SAMPLER = "prompt_sampler"
CRITIC_PRETRAINED = "critic_pretrained"
# How many runners have contributed to the batch.
NUM_ENV_RUNNERS = "num_env_runners"
NUM_STALE_EPISODES = "num_stale_episodes_dropped"
WEIGHTS_VERSION_LAG = "weights_version_lag"
WEIGHTS_PROBE_ERROR = "weights_probe_error"


@contextmanager
def _exits_are_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
        if str(frame.f_globals.get("__name__")).startswith("ray."):
            raise  # Ray ends this process.
        raise RuntimeError(
            f"sys.exit({error.code!r}) was called while {doing}, by {frame.f_code.co_name}() "
            f"in {frame.f_code.co_filename}:{frame.f_lineno}."
        ) from error


class DistRL(Algorithm):
    """One iteration: serve prompts, sample whole groups, update, sync weights, verify."""

    config: Any
    learner_group: Any
    env_runner_group: Any
    _built = False  # `on_algorithm_init` restores checkpoints before `setup` is done

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
        with _exits_are_errors("building the algorithm"):
            self._build(config)

    def _build(self, config: Any) -> None:
        resolve(self.config.model_config["model"])
        check_cluster(self.config)
        n_rows = self._check_task()
        sampler = registry.resolve(PROMPT_SAMPLER, self.config.prompt_sampler)
        self.prompt_sampler = sampler(n_rows, self.config.seed)
        self._critic_pretrained = self.config.critic_pretraining is None
        self._refused_in_a_row = 0
        try:
            super().setup(config)
        except IndexError as error:
            self._explain_dead_runners(error)
            raise
        self._check_probes = ProbeCheck(
            self.learner_group, self.config.model_config, self.config.sample_timeout_s
        )
        self._warn_of_mismatch = MismatchWarning(self.config)
        self.fleet = EnvRunnerFleet(self.env_runner_group, self.config, self._check_probes)
        self._batches = FreshBatches(self)
        # Another thread that scales waits for the end of the iteration.
        self._scaling = threading.RLock()
        self._built = True
        self._sync_weights()
        self.between_iterations = True

    def _check_task(self) -> int:
        """The task's number of rows; makes the env here, where its errors reach the user whole."""
        env: Any = self.env_creator(EnvContext(self.config.env_config, worker_index=0))
        task = check_env(env).task
        check_whole(env)
        env.reset(options={"row": 0})
        n_rows = len(task)
        env.close()
        return n_rows

    def _explain_dead_runners(self, error: IndexError) -> None:
        """Raises what kept all remote runners from starting, if that was it."""
        config = self.evaluation_config or self.config
        if config.num_env_runners and (why := why_no_runner_starts(config)):
            raise RuntimeError(f"No env runner starts. {why}") from error

    def train(self) -> dict[str, Any]:
        """One iteration, with RLlib's evaluation and callbacks.

        Raises:
            RuntimeError: code of the user's called ``sys.exit``, which would end the job in
                silence.
        """
        with _exits_are_errors("training"):
            return super().train()

    def training_step(self) -> None:
        """Samples, learns and syncs once; the first time the critic may learn beforehand.

        With ``max_staleness`` the runners sample the next batch while the learner learns.
        An error before the learners start leaves the state as the last iteration left it, and
        ``between_iterations`` true: such a state may be saved and trained on.

        Raises:
            NonFiniteError: when the learners refused too many steps in a row, or rewards or
                logps are not finite.
            RunnersLostError: when the batch could not be completed.
        """
        overlap = self.config.rollout_settings.max_staleness > 0
        with self._scaling:
            self._check_refusals()
            self._take_over_foreign_weights()
            if not self._critic_pretrained:
                pretrain(self)
                self._critic_pretrained = True
            with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
                batch = self._sample()
                self.metrics.aggregate(batch.metrics, key=ENV_RUNNER_RESULTS)
                self._log_runners(batch)
            self.between_iterations = False
            self.prompt_sampler.update(prompt_results([*batch.groups, *batch.dropped]))
            if overlap:
                with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                    self._send_weights()
                    self.fleet.admit()
                self._batches.start(self.config.rollout_settings.prompts_per_iteration)
            with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
                learner_results = self._update_learners(batch.groups)
                self.metrics.aggregate(learner_results, key=LEARNER_RESULTS)
            self._warn_of_mismatch(
                self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, "logp_mismatch_p95"))
            )
            self._refused_in_a_row = int(
                self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, REFUSED_IN_A_ROW))
            )
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self._fetch_weights()
                if not overlap:
                    self._send_weights()
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

    def _sample(self) -> SampledGroups:
        before = self._batches.prompts_learned
        try:
            batch, counts = sample_informative(
                self._sample_fresh,
                self.config.rollout_settings.prompts_per_iteration,
                self.config.max_sampling_rounds,
            )
        except Exception:
            if self.config.max_sampling_rounds > 1:
                # A checkpoint that is written now continues with the prompts of all rounds.
                self.prompt_sampler.set_state(before)
            raise
        for name, count in counts.items():
            self.metrics.log_value((ENV_RUNNER_RESULTS, name), count, window=1)
        return batch

    def _sample_fresh(self, n_prompts: int) -> SampledGroups:
        batch, n_stale = self._batches.next(n_prompts)
        self.metrics.log_value((ENV_RUNNER_RESULTS, NUM_STALE_EPISODES), n_stale, window=1)
        return batch

    @property
    def _version(self) -> int:
        return self._latest[1][0]

    def _log_runners(self, batch: SampledGroups) -> None:
        counts = {
            NUM_ENV_RUNNERS: len(batch.episodes_per_runner),
            WEIGHTS_VERSION_LAG: self._batches.lag(batch),
            WEIGHTS_PROBE_ERROR: self._check_probes.error,
            **self.fleet.take_counts(),
        }
        for name, count in counts.items():
            self.metrics.log_value((ENV_RUNNER_RESULTS, name), count, window=1)

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Lets runners that have come up into service; training does not wait for the others."""
        if env_runner_group is not self.env_runner_group:
            return super().restore_env_runners(env_runner_group)
        with self._scaling:
            # While a batch is under way, its weights may no longer be the learner's: runners are
            # admitted when it is finished.
            return [] if self._batches.under_way else self.fleet.admit()

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
            self._batches.drain()
            self.fleet.scale(n)

    def _update_learners(self, groups: list[list[SingleAgentEpisode]]) -> list[Any]:
        steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        settings = {
            "timesteps": {
                NUM_ENV_STEPS_SAMPLED_LIFETIME: steps,
                TRAINING_ITERATION: self.iteration + 1,
            },
            "num_epochs": self.config.num_epochs,
            "minibatch_size": self.config.minibatch_size,
            "shuffle_batch_per_epoch": self.config.shuffle_batch_per_epoch,
        }
        return update_learners(self.learner_group, self.config.num_learners, groups, settings)

    def _sync_weights(self) -> None:
        """Sends the policy to all runners, which prove that they have it."""
        self._fetch_weights()
        if self._built:
            self._send_weights()

    def _fetch_weights(self) -> None:
        dtype = self.config.rollout_settings.dtype
        self._latest = runner_weights(self.learner_group, dtype)
        self._weights_stamp = self._learners_stamp()

    def _learners_stamp(self) -> Any:
        results = self.learner_group.foreach_learner(lambda learner: learner.weights_stamp)
        return [result.get() for result in results]

    def _take_over_foreign_weights(self) -> None:
        """Syncs what somebody has put into the learners' modules since the last sync."""
        if self._learners_stamp() == self._weights_stamp:
            return
        before = self._latest[1]
        self._fetch_weights()
        if self._latest[1] != before:
            self._drop_batch()
            self._send_weights()

    def _drop_batch(self) -> None:
        """Forgets a batch that is under way; its prompts are served again."""
        if self._built and self._batches.under_way:
            served = self._batches.prompts_learned
            self._batches.drop()
            self.prompt_sampler.set_state(served)

    def _send_weights(self) -> None:
        update, weights = self._latest
        local_runner: Any = self.env_runner
        if local_runner is not None:
            local_runner.set_state(update)
            if not self.fleet.wanted:
                self._check_local_runner(local_runner)
        self.fleet.sync(update, weights)

    def _check_local_runner(self, runner: Any) -> None:
        held = runner.held_weights()
        check_weights("The local env runner", (held.version, held.hash), self._latest[1])
        self._check_probes({"The local env runner": held.probe})

    def export_model(self, path: str | Path) -> None:
        """Writes the policy as a plain Hugging Face folder."""
        export_policy(self, path)

    def cleanup(self) -> None:
        """Stops everything, also runners that do not answer."""
        self.fleet.stop()
        super().cleanup()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, the prompt sampler's behind the last batch learned, what is checked."""
        state = super().get_state(*args, **kwargs)
        state[PROMPT_SAMPLER] = self._batches.prompts_learned
        state[SETTINGS] = module_settings(self.config)
        state[WEIGHTS] = self._latest[1]
        state[CRITIC_PRETRAINED] = self._critic_pretrained
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from ``state``, of this algorithm or another one of the same model.

        Raises:
            ValueError: for a state of another model or critic, with the difference, or of other
                prompts.
        """
        check_settings(self.config, state.get(SETTINGS, {}), "The state")
        self._drop_batch()
        if PROMPT_SAMPLER in state:  # First: it may refuse.
            self.prompt_sampler.set_state(state[PROMPT_SAMPLER])
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
            ValueError: for a checkpoint of another model or critic, with the difference.
            RuntimeError: when the learners have not taken it over.
        """
        whole = kwargs.get("component") is None
        if whole:
            filesystem = kwargs.get("filesystem")
            saved = saved_settings(path, filesystem, self.STATE_FILE_NAME)
            check_settings(self.config, saved, f"The checkpoint {path}")
        self._drop_batch()
        self._restored_weights = None
        super().restore_from_path(path, *args, **kwargs)
        self._sync_weights()
        check_restored(path, self._restored_weights, self._latest[1])
        self.between_iterations = whole
