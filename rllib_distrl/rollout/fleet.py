"""The remote env runners of an algorithm: which serve, with which weights, and how many."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rllib_distrl.engine.weights import Probe
from rllib_distrl.rllib_traps import actor_manager, count_restart, next_runner_number
from rllib_distrl.rollout.completion_env_runner import LoadedWeights

CheckProbes = Callable[[Mapping[str, Probe]], None]
"""Compares what runners compute, by their names, with what the learner computes, or raises."""

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# What `EnvRunnerFleet.counts` counts.
NUM_FAILED_ENV_RUNNERS = "num_failed_env_runners"
NUM_HUNG_ENV_RUNNERS = "num_hung_env_runners"
NUM_LOST_PROMPTS = "num_lost_prompts"

_PROBE_S = 0.1  # a runner that is up answers a ping in a millisecond or two
_STOP_S = 10.0
# In no placement group. Ray 2.60 takes None, though it does not say so.
_NO_GROUP: Any = None
_OUTSIDE = PlacementGroupSchedulingStrategy(placement_group=_NO_GROUP)


class EnvRunnerFleet:
    """Keeps the remote runners of one `EnvRunnerGroup` at a wanted number, and up to date.

    A runner serves once it has confirmed version and hash of the present weights, and its engine
    computes the learner's logps with them. Until then, and after a failure, RLlib's actor manager,
    which also knows the runners, holds it for unhealthy. Runners that die are restarted by Ray,
    those that hang are killed first, and both come back through `admit`.

    Attributes:
        wanted: how many remote runners there should be.
        weights: version and content hash that every serving runner has confirmed, or will load
            before it samples what it is asked for from now on.
        deadline_s: how long a runner may take for anything before it counts as dead.
        counts: failures since the last `take_counts`.

    Args:
        group: the algorithm's `EnvRunnerGroup`, whose runners are taken over; `sync` comes next.
        config: its `AlgorithmConfig`.
        check_probes: compares what the runners compute with the learner.
        trial_id: of the Tune trial that the algorithm is, if it is one.
    """

    def __init__(
        self, group: Any, config: Any, check_probes: CheckProbes, trial_id: str | None = None
    ):
        self._manager = actor_manager(group)
        self._config, self._check_probes, self._trial_id = config, check_probes, trial_id
        self._config_ref: ObjectRef | None = None
        self._restarts: bool = config.restart_failed_env_runners
        self._update: dict[str, Any] | None = None
        self._in_store: ObjectRef | None = None
        self._process: dict[int, str] = {}
        self._confirmed: set[int] = set()  # served at the last look
        self._asked: dict[ObjectRef, int] = {}  # of `ask`, to the runner's number
        self._behind: set[int] = set()  # busy when the present weights came
        self._pings: dict[int, ObjectRef] = {}  # of runners that do not serve
        self.wanted: int = group.num_remote_env_runners()
        self.weights: tuple[int, str] = (-1, "")
        self.deadline_s = float(config.sample_timeout_s)
        self.counts: Counter[str] = Counter()

    def serving(self) -> list[int]:
        """Numbers of the runners that may be asked to sample with the present weights."""
        return self._manager.healthy_actor_ids()

    def present(self) -> int:
        """How many runners there are, those that are starting included."""
        return self._manager.num_actors()

    def name(self, number: int) -> str:
        """How messages call a runner: number, process and machine."""
        where = self._process.get(number)
        return f"Env runner {number} ({where})" if where else f"Env runner {number}"

    def process(self, number: int) -> str | None:
        """Which process of a runner has confirmed its weights."""
        return self._process.get(number)

    def serves(self, number: int, process: str | None) -> bool:
        """Whether a process that was a runner's still is, as far as it is known."""
        return number in self._confirmed and self.process(number) == process

    def sync(self, update: dict[str, Any], weights: tuple[int, str]) -> None:
        """Sends new weights to all serving runners and waits until each has confirmed them.

        Those that are silent for ``deadline_s`` are restarted. Nobody waits for those that are
        busy: they get the weights with what they are asked next, and then confirm both together.

        Args:
            update: what an env runner's ``set_state`` takes.
            weights: the version and content hash that they must confirm.

        Raises:
            RuntimeError: a runner has loaded something else, or computes other logps with it.
        """
        self.set_weights(update, weights)
        self._behind = set(self._busy())
        self._load([number for number in self.serving() if number not in self._behind])

    def set_weights(self, update: dict[str, Any], weights: tuple[int, str]) -> None:
        """Remembers weights for runners that `admit` lets in; see `sync`."""
        self._update, self._in_store, self.weights = update, None, weights
        if self.present():
            self._stored()  # Before the learner moves on.

    def _stored(self) -> ObjectRef:
        """The weights in Ray's object store, where they come once a remote runner needs them."""
        if self._in_store is None:
            self._in_store = ray.put(self._update)
        return self._in_store

    def admit(self) -> list[int]:
        """Brings runners that are up, new or restarted, into service; does not wait for others.

        Returns:
            Numbers of the runners that serve from now on.

        Raises:
            RuntimeError: a runner has loaded other weights than it was sent, or computes other
                logps with them.
        """
        manager = self._manager
        out = [number for number in manager.actor_ids() if not manager.is_actor_healthy(number)]
        for number in self._confirmed.intersection(out):
            self.fail(number, "was found dead by RLlib")
        confirmed = self._load(self._answering(out))
        for number in confirmed:
            manager.set_actor_state(number, healthy=True)
        return confirmed

    def _answering(self, numbers: list[int]) -> list[int]:
        """Those that answer a ping, which may have been sent long before they were up."""
        for number in numbers:
            if number not in self._pings:
                self._pings[number] = self._actor(number).ping.remote()
        pings = {self._pings[number]: number for number in numbers}
        answers = _collect(pings, _PROBE_S)
        for number, answer in answers:
            del self._pings[number]
            if isinstance(answer, ActorDiedError):
                self._replace(number, answer)
        return [number for number, answer in answers if not isinstance(answer, RayError)]

    def wait_for(self, n: int, timeout_s: float) -> bool:
        """Whether at least ``n`` runners serve within so many seconds."""
        give_up = time.monotonic() + timeout_s
        while len(self.serving()) < n:
            if time.monotonic() > give_up or self.present() < n:
                return False
            time.sleep(_PROBE_S)
            self.admit()
        return True

    def ask(self, number: int, **prompts: Any) -> tuple[ObjectRef, float]:
        """Asks a serving runner to sample, behind what it has been asked before.

        Args:
            number: the runner's.
            prompts: arguments of `CompletionEnvRunner.sample_prompts`.

        Returns:
            The call, for `answers`, and the (monotonic) time at which the runner is dead if it has
            not answered: whatever it must answer first may take ``deadline_s`` too.
        """
        update = self._stored() if number in self._behind else None
        self._behind.discard(number)
        turns = self._busy().count(number) + 1
        call = self._actor(number).sample_prompts.remote(
            **prompts, weights=self.weights, update=update
        )
        self._asked[call] = number
        return call, time.monotonic() + turns * self.deadline_s

    def _busy(self) -> list[int]:
        """The runner of each call that is not answered yet."""
        if self._asked:
            calls = list(self._asked)
            answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
            for call in answered:
                del self._asked[call]
        return list(self._asked.values())

    def answers(self, calls: dict[ObjectRef, _T], timeout_s: float) -> list[tuple[_T, Any]]:
        """Takes out of ``calls`` those of `ask` that have been answered.

        Args:
            calls: each with what tells it apart.
            timeout_s: how long to wait for the last one.

        Returns:
            Of each what tells it apart, and the answer or the exception that came instead.
        """
        before = list(calls)
        found = _collect(calls, timeout_s)
        for call in before:
            if call not in calls:
                self._asked.pop(call, None)
        return found

    def _actor(self, number: int) -> Any:
        return self._manager.actors()[number]

    def fail(self, number: int, why: str) -> None:
        """Takes a runner whose process has ended out of service."""
        self._count_failure(number)
        self._pings.pop(number, None)
        self._manager.set_actor_state(number, healthy=False)
        logger.warning("%s %s.", self.name(number), why)

    def _count_failure(self, number: int) -> None:
        self.counts[NUM_FAILED_ENV_RUNNERS] += number in self._confirmed
        self._confirmed.discard(number)

    def restart(self, number: int, why: str) -> None:
        """Kills a runner that hangs or is broken; Ray starts it again."""
        ray.kill(self._actor(number), no_restart=False)
        self.fail(number, f"{why}; it is restarted" if self._restarts else why)

    def scale(self, n: int) -> None:
        """Asks Ray for more runners, which `admit` lets in as they come up, or stops some.

        No runner may be sampling. New actors stand outside of the placement group of a Tune
        trial, which has no bundle for them.
        """
        self.wanted = n
        excess = self.present() - n
        # Those that do not serve yet go first, then the youngest.
        numbers = sorted(self._manager.actor_ids(), key=lambda i: (i not in self.serving(), i))
        if excess > 0:
            self._remove(numbers[-excess:])
        for _ in range(-excess):
            self._add()

    def take_counts(self) -> dict[str, int]:
        """Failures since the last call, by name."""
        names = (NUM_FAILED_ENV_RUNNERS, NUM_HUNG_ENV_RUNNERS, NUM_LOST_PROMPTS)
        taken = {name: self.counts[name] for name in names}
        self.counts.clear()
        return taken

    def stop(self) -> None:
        """Ends all remote runners. RLlib would wait without end for one that hangs."""
        self._remove(self._manager.actor_ids())

    def _load(self, numbers: list[int]) -> list[int]:
        """Sends the present weights; returns the numbers of those that have confirmed them."""
        if not numbers:
            return []
        calls = {self._actor(n).load_weights.remote(state=self._stored()): n for n in numbers}
        loaded = dict(_collect(calls, self.deadline_s))
        for number in numbers:
            self._confirm(number, loaded.get(number))
        confirmed = [n for n in numbers if isinstance(loaded.get(n), LoadedWeights)]
        self._check_probes({self.name(number): loaded[number].probe for number in confirmed})
        return confirmed

    def _confirm(self, number: int, answer: Any) -> None:
        if answer is None:
            self.counts[NUM_HUNG_ENV_RUNNERS] += 1
            self.restart(number, f"has not loaded its weights in {self.deadline_s:g} s")
        elif isinstance(answer, str):
            self.restart(number, f"could not load its weights: {answer}")
        elif not isinstance(answer, LoadedWeights):
            self.fail(number, f"was lost while loading weights: {first_line(answer)}")
        elif (answer.version, answer.hash) != self.weights:
            raise RuntimeError(
                f"{self.name(number)} was sent {_stamp(self.weights)} and has loaded "
                f"{_stamp((answer.version, answer.hash))}."
            )
        else:
            if self._process.get(number) not in (None, answer.process):
                count_restart(self._manager)
                self._count_failure(number)  # unless somebody has noticed its end before
            self._process[number] = answer.process
            self._confirmed.add(number)
            self._behind.discard(number)

    def _replace(self, number: int, error: ActorDiedError) -> None:
        """Removes a runner that Ray will not restart, and asks for another one in its place."""
        self._manager.remove_actor(number)
        self._confirmed.discard(number)
        self._pings.pop(number, None)
        if error.actor_init_failed:
            logger.error("%s cannot start and is not replaced: %s", self.name(number), error)
        elif self._restarts:
            count_restart(self._manager)
            logger.warning("%s is gone for good; Ray is asked for another.", self.name(number))
            self._add()
        else:
            logger.warning("%s is gone for good.", self.name(number))

    def _add(self) -> None:
        config, manager = self._config, self._manager
        if self._config_ref is None:
            self._config_ref = ray.put(config)
        actor = (
            ray.remote(config.env_runner_cls)
            .options(
                num_cpus=config.num_cpus_per_env_runner,
                num_gpus=config.num_gpus_per_env_runner,
                resources=config.custom_resources_per_env_runner,
                max_restarts=config.max_num_env_runner_restarts if self._restarts else 0,
                scheduling_strategy=_OUTSIDE,
            )
            .remote(
                config=self._config_ref,
                worker_index=next_runner_number(manager),
                num_workers=self.wanted,
                tune_trial_id=self._trial_id,
            )
        )
        manager.add_actors([actor])
        manager.set_actor_state(max(manager.actor_ids()), healthy=False)

    def _remove(self, numbers: list[int]) -> None:
        serving = [number for number in numbers if number in self.serving()]
        stops = {self._actor(number).stop.remote(): number for number in serving}
        _collect(stops, min(_STOP_S, self.deadline_s))
        for number in numbers:
            self._process.pop(number, None)
            self._confirmed.discard(number)
            self._pings.pop(number, None)
            ray.kill(self._manager.remove_actor(number))


def _collect(calls: dict[ObjectRef, _T], timeout_s: float) -> list[tuple[_T, Any]]:
    """Takes out of ``calls`` those that have ended within so many seconds.

    Returns:
        What each one stands for, and its result or the exception that came instead.
    """
    if not calls:
        return []
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    found = []
    for call in ready:
        try:
            answer = ray.get(call)
        except RayError as error:
            answer = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
        found.append((calls.pop(call), answer))
    return found


def _stamp(weights: tuple[int, str]) -> str:
    return f"version {weights[0]}, hash {weights[1][:12]}"


def first_line(error: Any) -> str:
    """An exception's message without its remote traceback."""
    return str(error).partition("\n")[0].rstrip(".")
