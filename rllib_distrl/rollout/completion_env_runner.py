"""An env runner that generates whole completions, then replays them through the env."""

import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from distrl_envs.task import Task, TaskError
from distrl_envs.tasks.data_task import DataTask
from distrl_envs.token_env import Verdict
from distrl_envs.user_code import named, report
from rllib_distrl.engine.make_engine import make_engine
from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams
from rllib_distrl.engine.weights import Probe, check_engine, take_probe
from rllib_distrl.method.branching import NONE
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.method.registry import resolve
from rllib_distrl.rllib_traps import leave_memory_unfilled
from rllib_distrl.rollout.branching import sample_branching
from rllib_distrl.rollout.contract import (
    TruncatedError,
    check_contract,
    check_env,
    whole_completions,
)
from rllib_distrl.rollout.episodes import build_episode, play, play_watched
from rllib_distrl.rollout.pool_metrics import PROBLEMS, pool_metrics, pool_record
from rllib_distrl.rollout.turns import sample_episodes
from rllib_distrl.settings import RolloutSettings

logger = logging.getLogger(__name__)

GENERATION_TIMER = "generation_timer"
GRADING_TIMER = "grading_timer"
REPLAY_TIMER = "replay_timer"
STATUS_METRIC = "grade_status"
TRUNCATED_METRIC = "truncated_share"
BRANCHED_METRIC = "branched_share"
"""Of completions that have begun as another one, where they may branch."""
# Keeps the random numbers of evaluation apart from those of training.
_EVALUATION_SEED_OFFSET = 1_000_003
# Visits of one runner that draws its own prompts; the next runner's begin there.
_VISITS_PER_RUNNER = 1 << 32


# Their frames say little about what failed in code of the user's.
_OWN_PACKAGES = ("distrl_envs", "rllib_distrl", "ray")


class LoadedWeights(NamedTuple):
    """A runner's receipt for new weights, and the process that holds them.

    The probe is what the engine samples with them, for the learner to compare.
    """

    version: int
    hash: str
    process: str
    probe: Probe


class Failure(NamedTuple):
    """Why nothing was sampled.

    Attributes:
        text: the error and its traceback.
        users: whether it is in the user's code, which would fail again.
    """

    text: str
    users: bool


Begun = Mapping[PromptRequest, Sequence[Completion]]
"""Groups of which not every row is over: what was sampled of each row, "paused" or whole."""


class RunnerReport(NamedTuple):
    """What a runner hands to the driver: episodes, or the error that stopped it.

    Errors travel as data, because an exception inside a Ray ``apply`` restarts the actor.

    Attributes:
        episodes: of whole groups, in the order of the prompts.
        metrics: of this sample.
        weights_version: of the weights that the engine holds.
        weights_hash: of the same.
        process: which process has answered.
        error: what has stopped it.
        begun: the groups that are not whole yet.
    """

    episodes: list[SingleAgentEpisode]
    metrics: dict[str, Any] | None
    weights_version: int
    weights_hash: str
    process: str
    error: Failure | None
    begun: Begun


_Row = tuple[Request, Completion]


class CallbackError(RuntimeError):
    """A user's callback failed. What it raised is the `__cause__`."""


def _watches_episodes(config: Any, callbacks: Sequence[RLlibCallback]) -> bool:
    """Whether a callback wants to see episodes before they end; then they are played slower."""
    names = ("on_episode_created", "on_episode_start", "on_episode_step")
    return any(
        getattr(config, f"callbacks_{name}")
        or any(getattr(type(one), name) is not getattr(RLlibCallback, name) for one in callbacks)
        for name in names
    )


def _branching_of(config: Any) -> Any:
    """How completions of training branch; None where they do not."""
    spec = getattr(config, "branching", NONE)
    stage = resolve("branching", NONE if config.in_evaluation else spec)
    return None if stage.name == NONE else stage()


def _failure(error: Exception) -> Failure:
    users = isinstance(error, TaskError | CallbackError | TruncatedError)
    return Failure(report(error, own=_OWN_PACKAGES if users else ()), users)


def _grouped(
    requests: Sequence[Request], rows: Sequence[Completion], sizes: Sequence[int]
) -> list[list[_Row]]:
    pairs = iter(zip(requests, rows, strict=True))
    return [list(itertools.islice(pairs, size)) for size in sizes]


def _is_whole(group: Sequence[_Row]) -> bool:
    return all(completion.finish_reason != "paused" for _, completion in group)


def _refuse_truncated(episodes: Sequence[SingleAgentEpisode]) -> None:
    for episode in episodes:
        if episode.is_truncated:
            raise TruncatedError(
                f"The environment truncated row {episode.infos[0]['row']} after {len(episode)} "
                f"tokens, as the wrapper TimeLimit does. {whole_completions(len(episode))}"
            )


def process_name() -> str:
    """This process, for people and for telling a restarted runner from the one before."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _off_training_problems(config: Any) -> Any:
    """The settings of an evaluation, on the validation split unless they name another.

    RLlib evaluates on the env of training, whose split is the one that is trained on.
    """
    if "split" in config.env_config:
        return config
    task = config.env_config.get("task")
    if isinstance(task, Task):
        if task.split == "train":
            logger.warning(
                "The evaluation asks training problems: env_config holds a finished task with "
                "split = 'train'. Give the evaluation one of its own: evaluation_config = "
                "{'env_config': {'task': ...}}."
            )
        return config
    config = config.copy(copy_frozen=False)
    return config.environment(env_config={**config.env_config, "split": "validation"})


class CompletionEnvRunner(SingleAgentEnvRunner):
    """Samples completions with a rollout engine and returns RLlib's own episodes.

    Stock algorithms call `sample`; the prompts are then drawn by the env. Our algorithms
    call `sample_prompts` with the rows that the driver's prompt sampler chose.
    """

    config: Any
    env: Any
    module: Any
    engine: Any

    def __init__(self, *, config: Any, **kwargs: Any):
        """Builds env, module and engine as ``config`` says."""
        if not kwargs.get("worker_index"):  # The driver's: its errors reach the user as they are.
            check_contract(config)
        self.rollout = RolloutSettings.of(config.model_config)
        torch.set_num_threads(self.rollout.torch_threads)
        leave_memory_unfilled()
        if config.in_evaluation:
            config = _off_training_problems(config)
        super().__init__(config=config, **kwargs)
        # The local runner beside remote ones has no env, and nothing to sample.
        self.engine = None if self.env is None else self.make_engine()
        self.load_engine()
        self._check_engine()
        # Our algorithms always have a seed; see `DistRLConfig.validate`.
        self._sampling_seed = secrets.randbelow(2**31) if config.seed is None else config.seed
        self.branching = _branching_of(config)
        self._drawn = 0  # prompts that this runner chose by itself
        self._watched = _watches_episodes(config, self._callbacks)

    def make_env(self) -> None:
        """Makes the envs; the innermost must be a `TokenEnv`."""
        super().make_env()
        check_env(self.token_env)

    def make_module(self) -> None:
        """Builds the module on the CPU, also where the engine has a GPU: it only hands weights on.

        Ray 2.60 would put it beside the engine, at four bytes per parameter.
        """
        device, self._device = self._device, torch.device("cpu")
        super().make_module()
        self._device = device

    @property
    def token_env(self) -> Any:
        """The first sub-env, in which completions are replayed."""
        return self.env.unwrapped.envs[0]

    def make_engine(self) -> RolloutEngine:
        """What samples for this runner, with the module's architecture and no weights yet."""
        return make_engine(model_config=self.module.policy.config, **self._engine_settings)

    @property
    def _engine_settings(self) -> dict[str, Any]:
        return {
            "name": self.rollout.engine,
            "eos_token_ids": tuple(self.token_env.unwrapped.eos_token_ids),
            "max_batch_size": self.rollout.max_batch_size,
            "device": str(self._device or "cpu"),
            "dtype": getattr(torch, self.rollout.dtype),
            "options": self.rollout.engine_options,
        }

    def share_engine(self, other: "CompletionEnvRunner", state: dict[str, Any]) -> None:
        """Samples with another runner's engine from now on, where its own would be the same.

        Then weights, keys and values are in memory once. The two never sample at the same time, and
        both sample with what the learner has.

        Args:
            other: a runner of this process.
            state: what `set_state` takes, with the weights that the engine has.
        """
        if self.engine is None or other.engine is None or self.rollout.engine != "torch":
            return
        if type(self.engine) is type(other.engine) and (
            self._engine_settings == other._engine_settings
        ):
            self.engine = other.engine
            self.set_state(state)

    def load_engine(self) -> None:
        """Gives the engine the module's weights, and keeps their hash."""
        if self.engine is None:
            return
        state = self.module.policy.state_dict()
        self._weights_hash = self.engine.load_weights(state, self._weights_seq_no)

    def _check_engine(self) -> None:
        """Refuses a model that the engine does not sample from as it should."""
        if self.engine is not None:
            params, dtype = self.sampling_params(True), self.rollout.dtype
            check_engine(self.engine, self.module.policy, params, dtype)

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over ``state``; new weights go on to the engine.

        Also loads weights that are older than the present ones: Ray 2.60 keeps the newer
        ones after an in-place restore, but reports the older number.
        """
        if COMPONENT_RL_MODULE in state:
            self._weights_seq_no = 0
        super().set_state(state)
        if COMPONENT_RL_MODULE in state:
            self.load_engine()

    def load_weights(self, state: dict[str, Any]) -> LoadedWeights | str:
        """Takes over ``state`` and proves what the engine then holds, or says what went wrong."""
        try:
            self.set_state(state)
            return self.held_weights()
        except Exception as error:
            return _failure(error).text

    def held_weights(self) -> LoadedWeights:
        """What the engine holds: version, hash, and a probe that was sampled with it."""
        _, info = self.token_env.reset(options={"row": 0})
        probe = take_probe(self.engine, info["prompt_ids"], self.sampling_params(True))
        return LoadedWeights(self.engine.version, self._weights_hash, process_name(), probe)

    def sampling_params(self, explore: bool) -> SamplingParams:
        """How to sample: as the recipe says, or greedily with ``explore=False``."""
        return SamplingParams.of(self.rollout.to_dict(), self._longest, greedy=not explore)

    def sample_prompts(
        self,
        prompts: Sequence[PromptRequest],
        num_generations: int | Sequence[int],
        weights: tuple[int, str] | None = None,
        temperature: float | None = None,
        begun: Begun | None = None,
        update: dict[str, Any] | None = None,
    ) -> RunnerReport:
        """Completes each prompt ``num_generations`` times; whole groups, in order.

        Args:
            prompts: what to complete.
            num_generations: completions per prompt, or of each.
            weights: version and hash to sample with; with others nothing is sampled.
            temperature: of the sampling; None: the recipe's.
            begun: samples one segment of each row, ``[rollout] segment_tokens``, behind what it has
                of some prompts here; None: all rows to their end.
            update: weights to load beforehand; see `set_state`.

        Returns:
            The episodes of whole groups, and the weights that the engine holds.
        """
        open_groups: Begun = {}
        try:
            if update is not None:
                self.set_state(update)
            if weights not in (None, (self.engine.version, self._weights_hash)):
                prompts = []
            segment = 0 if begun is None else self.rollout.segment_tokens
            params = self.sampling_params(self.config.explore)
            if temperature is not None:
                params = replace(params, temperature=temperature)
            groups = self._sample_groups(prompts, num_generations, params, begun, segment)
            open_groups = {
                prompt: [completion for _, completion in group]
                for prompt, group in zip(prompts, groups, strict=True)
                if not _is_whole(group)
            }
            whole = [row for group in groups if _is_whole(group) for row in group]
            episodes = self._finish(whole, params)
            _refuse_truncated(episodes)
            self._count(episodes)
            self._end_sample(episodes)
            metrics, failure = self.get_metrics(), None
        except Exception as error:
            episodes, metrics, failure, open_groups = [], None, _failure(error), {}
        return RunnerReport(
            episodes,
            metrics,
            self.engine.version,
            self._weights_hash,
            process_name(),
            failure,
            open_groups,
        )

    def _sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        """RLlib's entry: about ``num_timesteps`` steps, or ``num_episodes`` episodes at least."""
        if random_actions:
            raise ValueError("CompletionEnvRunner samples from the model: random_actions=False.")
        if self.config.in_evaluation and (force_reset or num_episodes is not None):
            self._drawn = 0  # every evaluation begins with the first problem again
        episodes: list[SingleAgentEpisode] = []
        steps, wanted = 0, num_timesteps or 0
        generations = self._generations(num_episodes is not None)
        while len(episodes) < num_episodes if num_episodes is not None else steps < wanted:
            if num_episodes is not None:
                n_prompts = -(-(num_episodes - len(episodes)) // generations)
            else:
                length = steps / len(episodes) if episodes else self._longest
                n_prompts = max(1, round((wanted - steps) / length / generations))
            prompts = self._draw_prompts(n_prompts)
            params = self.sampling_params(explore)
            groups = self._sample_groups(prompts, generations, params)
            new = self._finish([row for group in groups for row in group], params)
            if self.config.in_evaluation:
                self._log_pools(prompts, new, generations)
            episodes += new
            steps += sum(map(len, new))
        self._count(episodes)
        return episodes

    @property
    def _longest(self) -> int:
        return self.token_env.unwrapped.max_completion_tokens

    def _generations(self, by_episodes: bool) -> int:
        """Completions per prompt where RLlib asks for samples."""
        if self.config.in_evaluation:
            return self.rollout.evaluation_generations
        return 1 if by_episodes else self.rollout.num_generations

    def _log_pools(
        self,
        prompts: Sequence[PromptRequest],
        episodes: Sequence[SingleAgentEpisode],
        generations: int,
    ) -> None:
        """Metrics of each problem's pool of completions, and the pools themselves as counts."""
        task = self.token_env.unwrapped.task
        equivalent = task.same_answer if isinstance(task, DataTask) else None
        if any(episode.is_truncated for episode in episodes):
            return  # What a wrapper has cut has no grade.
        grades = [episode.infos[-1]["grade"] for episode in episodes]
        for number, prompt in enumerate(prompts):
            some = grades[number * generations : (number + 1) * generations]
            kept = pool_record(prompt.row, prompt.visit, some)
            self.metrics.log_value(PROBLEMS, kept, reduce="item_series")
            pool = pool_metrics(some, equivalent, votes=task.names_answers)
            for name, value in pool.items():
                self.metrics.log_value(name, value, reduce="mean")

    def _draw_prompts(self, n: int) -> list[PromptRequest]:
        choose = self._validation_prompt if self.config.in_evaluation else self._drawn_prompt
        prompts = []
        for _ in range(n):
            prompts.append(choose())
            self._drawn += 1
        return prompts

    def _validation_prompt(self) -> PromptRequest:
        """The next row in order, the rows being dealt out among the runners."""
        first, runners = max(self.worker_index or 0, 1) - 1, max(self.num_workers or 0, 1)
        position = first + runners * self._drawn
        visit, row = divmod(position, len(self.token_env.unwrapped.task))
        return PromptRequest(row, visit)

    def _drawn_prompt(self) -> PromptRequest:
        """A row drawn by the env itself, the first time seeded as RLlib seeds it."""
        seed = self._seed if self._needs_initial_reset else None
        self._needs_initial_reset = False
        _, info = self.token_env.reset(seed=seed)
        visit = self._drawn + _VISITS_PER_RUNNER * (self.worker_index or 0)
        return PromptRequest(info["row"], visit)

    def _sample_groups(
        self,
        prompts: Sequence[PromptRequest],
        num_generations: int | Sequence[int],
        params: SamplingParams,
        begun: Begun | None = None,
        segment: int = 0,
    ) -> list[list[_Row]]:
        """The rows of each prompt: whole, or with `segment` perhaps paused."""
        started = time.perf_counter()
        requests, begun = self.requests(prompts, num_generations), begun or {}
        fixed = isinstance(num_generations, int)
        sizes = [num_generations] * len(prompts) if fixed else num_generations[: len(prompts)]
        if self.branching is not None:
            rows = self._branched(requests, sizes, params)
            self.metrics.log_value(GENERATION_TIMER, time.perf_counter() - started, reduce="sum")
            return _grouped(requests, rows, sizes)
        rows: list[Any] = []
        for prompt, size in zip(prompts, sizes, strict=True):
            rows += begun.get(prompt, [None] * size)
        asked = [i for i, row in enumerate(rows) if row is None or row.finish_reason == "paused"]
        for at, completion in sample_episodes(
            self.engine,
            [requests[i] for i in asked],
            params,
            self.token_env.unwrapped,
            [rows[i] for i in asked],
            segment,
        ):
            before = rows[asked[at]]
            done = np.zeros(0, dtype=np.int64) if before is None else before.versions
            new = np.full(len(completion.tokens) - len(done), self._weights_seq_no)
            completion.versions = np.concatenate((done, new))
            rows[asked[at]] = completion
        self.metrics.log_value(GENERATION_TIMER, time.perf_counter() - started, reduce="sum")
        return _grouped(requests, rows, sizes)

    def _branched(
        self, requests: Sequence[Request], sizes: Sequence[int], params: SamplingParams
    ) -> list[Completion]:
        """Whole completions, some of which share their beginning."""
        env = self.token_env.unwrapped
        rows, shared = sample_branching(self.engine, requests, params, env, sizes, self.branching)
        for row, common in zip(rows, shared, strict=True):
            row.versions = np.full(len(row.tokens), self._weights_seq_no)
            self.metrics.log_value(BRANCHED_METRIC, float(common > 0), reduce="mean")
        return rows

    def _finish(self, rows: Sequence[_Row], params: SamplingParams) -> list[SingleAgentEpisode]:
        """Grades whole completions and makes episodes of them."""
        started = time.perf_counter()
        requests, completions = [row[0] for row in rows], [row[1] for row in rows]
        verdicts = self.grade(requests, completions)
        graded = time.perf_counter()
        # One dict for all episodes: it is pickled once.
        sampling = params.distribution()
        episodes = [
            self._replay(*played, sampling)
            for played in zip(requests, completions, verdicts, strict=True)
        ]
        self.metrics.log_value(GRADING_TIMER, graded - started, reduce="sum")
        self.metrics.log_value(REPLAY_TIMER, time.perf_counter() - graded, reduce="sum")
        return episodes

    def requests(
        self, prompts: Sequence[PromptRequest], num_generations: int | Sequence[int]
    ) -> list[Request]:
        """What the engine is asked: a request for each completion, its randomness by its key.

        Args:
            prompts: Rows and visits.
            num_generations: Completions of each, or of all.
        """
        seed = self._sampling_seed + (_EVALUATION_SEED_OFFSET * self.config.in_evaluation)
        if not prompts:
            return []
        same = isinstance(num_generations, int)
        sizes = [num_generations] * len(prompts) if same else num_generations
        requests = []
        for prompt, size in zip(prompts, sizes, strict=not same):
            _, info = self.token_env.reset(options={"row": prompt.row})
            requests += [
                Request(info["prompt_ids"], (seed, prompt.row, sample, prompt.visit))
                for sample in range(size)
            ]
        return requests

    def grade(
        self, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Verdict]:
        """The env's verdicts on a batch, which tasks with worker processes grade in parallel."""
        tokens = [np.asarray(completion.tokens).tolist() for completion in completions]
        rows = [request.key[1] for request in requests]
        replies = [completion.replies for completion in completions]
        return self.token_env.unwrapped.grade_many(rows, tokens, replies)

    def _replay(
        self,
        request: Request,
        completion: Completion,
        verdict: Verdict,
        sampling: dict[str, Any],
    ) -> SingleAgentEpisode:
        """Plays the completion through the env and calls RLlib's callbacks of episodes."""
        env = self.token_env
        self._played_row = request.key[1]
        if self._watched:
            episode = play_watched(env, request, completion, verdict, sampling, self._call_hook)
        else:
            played = play(env, request, completion, verdict)
            episode = build_episode(env, request, completion, played, sampling)
        self._call_hook("on_episode_end", episode)
        info = episode.infos[-1]
        if "grade" in info:  # A completion that a wrapper has cut is not graded.
            self.metrics.log_value((STATUS_METRIC, info["grade"].status), 1, reduce="sum")
        cut = episode.is_truncated or info.get("finish_reason") in ("length", "context")
        self.metrics.log_value(TRUNCATED_METRIC, float(cut), reduce="mean")
        return episode

    def _call_hook(self, name: str, episode: SingleAgentEpisode) -> None:
        """Calls an RLlib callback about an episode.

        Raises:
            CallbackError: for whatever the callback raises, with the episode's row.
        """
        try:
            self._make_on_episode_callback(name, 0, [episode])
        except (Exception, SystemExit) as error:
            raise CallbackError(
                f"The callback {name} failed on row {self._played_row}: {named(error)}"
            ) from error

    def _end_sample(self, episodes: list[SingleAgentEpisode]) -> None:
        """RLlib's callback at the end of `sample`, for samples that the driver asks for."""
        try:
            make_callback(
                "on_sample_end",
                callbacks_objects=self._callbacks,
                callbacks_functions=self.config.callbacks_on_sample_end,
                kwargs={
                    "env_runner": self,
                    "metrics_logger": self.metrics,
                    "samples": episodes,
                },
            )
        except (Exception, SystemExit) as error:
            raise CallbackError(f"The callback on_sample_end failed: {named(error)}") from error

    def _count(self, episodes: list[SingleAgentEpisode]) -> None:
        steps = sum(map(len, episodes))
        self._done_episodes_for_metrics.extend(episodes)
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
        self._increase_sampled_metrics(steps, len(episodes))
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
