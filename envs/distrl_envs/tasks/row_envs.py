"""Environments of others whose episodes are rows of data: SkyRL-Gym's and verifiers'."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from hashlib import blake2b
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any, ClassVar

from distrl_envs.data import CONTEXT, Numbered, read_rows
from distrl_envs.task import PLACE, Grade, Problem, TaskError, Turn, checked_number
from distrl_envs.tasks.data_task import PROBLEM, DataTask
from distrl_envs.tasks.text_envs import EMPTY, TURNS, ReplayedTask, Seeded, Step, source_hash
from distrl_envs.user_code import named, search_working_directory

Message = Mapping[str, Any]


class RowTask(ReplayedTask, DataTask):
    """An environment that is given a row of data, and plays from there.

    What `ReplayedTask` says holds. The chat of the row is the prompt: one that the environment
    writes itself is refused. The action of a turn is all that the model has written. A turn that a
    limit cut short is played for its score, as the library does, and not replied to. Python's and
    NumPy's global generators are seeded from the row for a replay and put back behind it; replays
    of one process therefore wait for each other.
    """

    chance_from = "its row, or from Python's and NumPy's global generators"
    gold_fields: ClassVar[Sequence[str]]
    """Fields that tell rows with one prompt apart: games, whose secrets are in the data."""

    def __init__(
        self,
        env_id: str,
        data: str | Path | Mapping[str, str],
        *,
        env_kwargs: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        correct_from: float | None = None,
        slow: bool = False,
        instruction: str = "{problem}",
        read: Callable[[str], Numbered] = read_rows,
        **common: Any,
    ):
        """Loads the rows and plays the first one up to the model's turn.

        Args:
            env_id: The environment's id.
            data: Where the rows are; see `DataTask`.
            env_kwargs: The environment's own settings.
            max_turns: Turns of the model; by default the environment's own limit.
            correct_from: Least return of a correct episode; by default the environment's own
                threshold where it has one, or 1.
            slow: Whether a reply may take longer than a few milliseconds; see `replies_slowly`.
            instruction: Prompt around `{problem}`, the last message of the row's chat.
            read: Yields the rows of a source.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the library or the environment is missing, cannot be played here, or the
                data has faults.
        """
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"Got max_turns={max_turns} for {env_id!r}; it must be at least 1.")
        self.name = f"{self.library}:{env_id}"  # as a recipe names it
        self.env_id, self.env_kwargs = env_id, dict(env_kwargs or {})
        self.replies_slowly = slow
        self._turns_given = max_turns
        super().__init__(
            data, {"problem": PROBLEM}, instruction=instruction, check=self._check_row, read=read,
            **common,
        )  # fmt: skip
        limit, threshold, module = self._look()
        self.max_turns = limit if max_turns is None else int(max_turns)
        self.correct_from = float(threshold if correct_from is None else correct_from)
        self._source = source_hash(module)
        try:
            self._play(self.problem(0), ())
        except TaskError as error:
            raise ValueError(str(error)) from error

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """Grades an episode of one turn."""
        return self.grade_turns(problem, [Turn(completion)], truncated=truncated)

    @abstractmethod
    def _look(self) -> tuple[int, float, str]:
        """An environment's own limit of turns, threshold of the return, and module.

        Raises:
            ValueError: If it is of a kind that cannot be played here.
        """

    def _check_row(self, row: dict[str, Any]) -> None:
        """Raises ValueError for a row that is not this environment's."""

    def _chat(self, problem: Problem) -> list[Message]:
        """The messages of a row."""
        return [*map(dict, self.context(problem)), {"role": "user", "content": problem.prompt}]

    def _key(self, row: dict[str, Any]) -> str:
        golds = [row[name] for name in self.gold_fields if row.get(name)]
        return " ".join([super()._key(row), *map(repr, golds)])

    def _fields(self, problem: Problem) -> dict[str, Any]:
        """A copy of a row's other fields: what an environment does to them ends with the replay."""
        own = ("problem", CONTEXT, PLACE)
        return copy.deepcopy({key: v for key, v in problem.data.items() if key not in own})

    def _seeded(self, problem: Problem) -> Seeded:
        digest = blake2b(problem.key.encode("utf-8", "replace"), digest_size=4).digest()
        return Seeded(int.from_bytes(digest, "big"))

    def _check_start(self, problem: Problem, chat: Sequence[Message]) -> Step:
        """The start, where the environment has left the prompt as the row has it."""
        if _plain(chat) != _plain(self._chat(problem)):
            raise TaskError(
                f"The environment {self.name!r} writes its prompts itself: on row {problem.row} "
                f"it asks {_plain(chat)!r:.200} instead of the row's messages. Write the prompts "
                "into the data."
            )
        return Step(problem.prompt)

    def _said(self, problem: Problem, messages: Sequence[Message]) -> str:
        """The text of what an environment says between two turns of the model.

        Raises:
            TaskError: If it is not the user who speaks.
        """
        texts = []
        for role, content in _plain(messages):
            if role != "user" or not isinstance(content, str):
                raise TaskError(
                    f"The environment {self.name!r} replied with a message of {role!r} on row "
                    f"{problem.row}, {content!r:.100}; replies are texts of the role 'user' here."
                )
            texts.append(content)
        return "\n\n".join(texts) or EMPTY


class SkyRLTask(RowTask):
    """An environment of SkyRL-Gym: `task = "skyrl_gym:ID"`, or `skyrl_gym:module:ID` of one's own.

    What `RowTask` says holds. The rows are those that SkyRL trains on: `prompt` is the chat, and
    the environment is made with all other fields as its `extras`. A step's reward is the turn's;
    that of a turn without a reply, of one-turn episodes for instance, is the score at the end.

    Refused are environments that ask a service, whose failures read like its answers; that run the
    model's code without a sandbox; and that answer in the order of a Python set, which differs
    between processes. An environment that rewrites what the model has written
    (`postprocessed_action`) is an error: a stop string ends a turn.
    """

    library = "skyrl_gym"
    gold_fields = ("reward_spec", "reward_model")

    def __init__(self, env_id: str, data: str | Path | Mapping[str, str], **common: Any):
        """Loads the rows and makes the environment of the first one.

        Args:
            env_id: As registered with SkyRL-Gym, with the module that registers it before it.
            data: A file or `hf:name/split`, or one for each split; see `DataTask`.
            **common: As for every `RowTask`. `env_kwargs` are the environment's configuration,
                and `max_turns`, where it is given, is told to it.

        Raises:
            ValueError: As for every `RowTask`.
        """
        self._module, _, self._id = env_id.rpartition(":")
        if self._id in _SKYRL_REFUSED:
            raise ValueError(f"SkyRL-Gym's {self._id!r} cannot be used: {_SKYRL_REFUSED[self._id]}")
        fields = common.pop("fields", None)
        super().__init__(env_id, data, fields={"problem": "prompt", **(fields or {})}, **common)

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """The reward of the turn that had no reply; the status by the sum of all rewards."""
        rewards = [step.reward for step in self._play(problem, turns)[1:]]
        last = zip(rewards, turns, strict=True)
        score = sum(reward for reward, turn in last if turn.reply is None)
        return self._verdict(score, sum(rewards) >= self.correct_from, truncated)

    def _look(self) -> tuple[int, float, str]:
        env = self._make(self.problem(0))
        groups = [type(group).__name__ for group in getattr(env, "tool_groups", ())]
        if refused := [name for name in groups if name in _SKYRL_TOOLS]:
            why = _SKYRL_REFUSED[_SKYRL_TOOLS[refused[0]]]
            raise ValueError(f"{self.name!r} cannot be used with its {refused[0]}: {why}")
        return max(1, int(env.max_turns)), 1.0, type(env).__module__

    def _make(self, problem: Problem) -> Any:
        try:
            import skyrl_gym
            from omegaconf import OmegaConf

            search_working_directory()
            if self._module:
                __import__(self._module)
        except ImportError as error:
            raise ValueError(
                f"The environment {self.env_id!r} could not be imported: {named(error)}. SkyRL-Gym "
                "itself comes with: pip install 'rllib-distrl[skyrl-gym]'."
            ) from error
        extras = self._fields(problem)
        if self._turns_given is not None:
            extras["max_turns"] = self._turns_given
        config = OmegaConf.create(self.env_kwargs)
        try:
            return skyrl_gym.make(self._id, env_config=config, extras=extras)
        except (skyrl_gym.error.Error, AssertionError, TypeError, LookupError, OSError) as error:
            raise ValueError(
                f"SkyRL-Gym cannot make the environment {self._id!r} for row {problem.row} "
                f"({problem.data[PLACE]}): {named(error):.300}. Where a module of yours registers "
                "it, name that too: skyrl_gym:my_module:ID."
            ) from error

    def _check_row(self, row: dict[str, Any]) -> None:
        found = row.pop("env_class", None) or self._id
        if found != self._id:
            raise ValueError(f"field 'env_class' is {found!r}; this task plays {self._id!r}")

    def _steps(self, problem: Problem, actions: Sequence[str]) -> list[Step]:
        with self._seeded(problem):
            env = self._make(problem)
            try:
                chat, _ = env.init(self._chat(problem))
                steps = [self._check_start(problem, chat)]
                return steps + [self._step(problem, env, action) for action in actions]
            finally:
                env.close()

    def _step(self, problem: Problem, env: Any, action: str) -> Step:
        output = env.step(action)
        if output.get("postprocessed_action") not in (None, action):
            raise TaskError(
                f"The environment {self.name!r} rewrites what the model has written, on row "
                f"{problem.row} to {output['postprocessed_action']!r:.200}; here that stays as it "
                "was sampled. Set stop in [environment.env_config] to what ends a turn."
            )
        reward = checked_number(output["reward"], "a step's reward")
        over, said = bool(output["done"]), output["observations"]
        return Step("" if over else self._said(problem, said), reward, over)


_SKYRL_REFUSED = {
    "search": "it asks a retrieval service over the network, and reads the service's failures as "
    "observations. Give a function of your own as a tool: distrl_envs:distrl/Tools-v0.",
    "searchcode": "it asks a retrieval service over the network, and runs the model's programs "
    "without a sandbox. Use distrl_envs:distrl/Tools-v0.",
    "text2sql": "it shows the rows of a query in the order of a Python set, which differs between "
    "processes, so that an episode cannot be played again.",
    "lcb": "it runs the model's programs without a sandbox. Use distrl_envs:distrl/Code-v0 with "
    'format = "livecodebench".',
}
"""Why registered environments of SkyRL-Gym are refused, and what to use."""

_SKYRL_TOOLS = {
    "SearchToolGroup": "search",
    "PythonCodeExecutorToolGroup": "searchcode",
    "SQLCodeExecutorToolGroup": "text2sql",
}
"""Tools that bring the same reasons to environments of one's own."""


class VerifiersTask(RowTask):
    """An environment of verifiers (Brown 2025): `task = "verifiers:ENV"`, one turn or several.

    What `RowTask` says holds. `ENV` is what `verifiers.load_environment` takes: an installed
    package, or a module of one's own with `load_environment`. The rows of its `dataset` are the
    problems; its `eval_dataset`, where it has one, is the split "test". A replay is a rollout of
    the environment's own, `rollout`, with a client that gives the recorded completions: its
    set-up, its stop conditions and its `env_response` are as they are there. The score is the
    rubric's reward for the whole episode. What a reward function raises, and what it returns that
    is no number, is an error, where the library itself would count 0.

    Refused are environments with tools (they need an API's tool calls), sandboxes, browsers and
    servers; a judge model; rewards that compare the rollouts of a group; and advantages of their
    own. An environment that puts rewards on single turns, or changes what the model has read, is an
    error, as is a time limit that is passed.
    """

    library = "verifiers"
    gold_fields = ("answer", "info")

    def __init__(self, env_id: str, **common: Any):
        """Loads the environment, and plays its first row up to the model's turn.

        Args:
            env_id: As `verifiers.load_environment` takes it.
            **common: As for every `RowTask`. `env_kwargs` are arguments of `load_environment`;
                `correct_from` is by default the environment's `pass_threshold`.

        Raises:
            ValueError: As for every `RowTask`.
        """
        self.env_id, self.env_kwargs = env_id, dict(common.get("env_kwargs") or {})
        self._env: Any = None
        self._failures: list[str] = []
        env = self._loaded_env()
        sources = {"train": env.build_dataset(), "test": env.build_eval_dataset()}
        found = {
            split: f"{self.library}:{env_id} ({'dataset' if split == 'train' else 'eval_dataset'})"
            for split, rows in sources.items()
            if rows is not None
        }

        def read(source: str) -> Iterator[tuple[str, Any]]:
            rows = next(sources[split] for split, name in found.items() if name == source)
            return ((f"{source}:{number}", row) for number, row in enumerate(rows))

        super().__init__(env_id, found, fields={"problem": "prompt"}, read=read, **common)

    def __getstate__(self) -> dict[str, Any]:
        """Each process loads the environment itself."""
        return {**super().__getstate__(), "_env": None, "_failures": []}

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """The rubric's reward; `correct` where it reaches `correct_from`.

        Raises:
            TaskError: If a reward function fails.
        """
        self._play(problem, [turn for turn in turns if turn.reply is not None])
        completions = [turn.completion for turn in turns]
        state, _ = self._rollout(problem, completions, truncated=truncated, graded=True)
        score = checked_number(state["reward"], "the rubric's reward")
        return self._verdict(score, score >= self.correct_from, truncated)

    def _look(self) -> tuple[int, float, str]:
        from verifiers.utils.env_utils import env_module_name

        env = self._loaded_env()
        limits = [part.max_turns for part in _parts(env) if not hasattr(part, "envs")]
        limit = max(TURNS if limit <= 0 else limit for limit in limits)
        return limit, env.pass_threshold, env_module_name(self.env_id)

    def _loaded_env(self) -> Any:
        with _LOADING:
            if self._env is None:
                self._env = _load(self.env_id, self.env_kwargs)
                for rubric in _rubrics(self._env.rubric):
                    rubric.funcs[:] = [_watched(func, self._failures) for func in rubric.funcs]
            return self._env

    def _steps(self, problem: Problem, actions: Sequence[str]) -> list[Step]:
        _, asked = self._rollout(problem, actions)
        if not asked:
            raise TaskError(f"{self.name!r} ends row {problem.row} before the model's first turn.")
        steps = [self._check_start(problem, asked[0])]
        for number, action in enumerate(actions, 1):
            if number >= len(asked):
                steps.append(Step("", over=True))
                continue
            before = [*_plain(asked[number - 1]), ("assistant", action)]
            if _plain(asked[number])[: len(before)] != before:
                raise TaskError(
                    f"The environment {self.name!r} changes what the model has read and written "
                    f"before turn {number + 1} of row {problem.row}; here that stays."
                )
            steps.append(Step(self._said(problem, asked[number][len(before) :])))
        return steps

    def _rollout(
        self,
        problem: Problem,
        completions: Sequence[str],
        *,
        truncated: bool = False,
        graded: bool = False,
    ) -> tuple[Any, list[Any]]:
        """The state behind a rollout of verifiers' own, and the chats that the model was asked."""
        env, client = self._loaded_env(), _script()(completions, truncated)
        row = {**self._fields(problem), "prompt": self._chat(problem)}

        async def play() -> Any:
            state = await env.rollout(row, client, "recorded", {})
            if graded:
                await env.rubric.score_rollout(state)
                await env.rubric.cleanup(state)
            return state

        with self._seeded(problem):
            self._failures.clear()
            state = asyncio.run_coroutine_threadsafe(play(), _loop(os.getpid())).result()
            failures = [*self._failures]
        where = f"The environment {self.name!r} failed on row {problem.row}"
        if state["error"] is not None:
            cause = state["error"].__cause__
            why = ", from ".join(named(error) for error in (state["error"], cause) if error)
            raise TaskError(f"{where}: {why}") from state["error"]
        if state.get("timed_out"):
            raise TaskError(f"{where}: a time limit of its own was passed.")
        if failures:
            raise TaskError(f"{where}, whose rewards would count 0 there: {'; '.join(failures)}")
        if state["tool_defs"]:
            raise TaskError(f"{where}: the row has tools, which need an API's tool calls.")
        if any(step["reward"] is not None for step in state["trajectory"]):
            raise TaskError(
                f"{where}: it rewards single turns beside its rubric, which is not read here."
            )
        return state, client.asked


_LOADING = Lock()

_VERIFIERS_REFUSED = {
    "SandboxEnv": "runs in a sandbox service",
    "SandboxMixin": "runs in a sandbox service",
    "CliAgentEnv": "runs an agent in a sandbox service",
    "BrowserEnv": "drives a browser service",
    "OpenEnvEnv": "is played on a server",
    "MCPEnv": "takes its tools from servers",
    "StatefulToolEnv": "has tools with a state, by an API's tool calls",
    "ToolEnv": "has tools, by an API's tool calls",
}
"""Classes of verifiers' environments that cannot be played here, and why; nearest first."""


def _load(env_id: str, kwargs: Mapping[str, Any]) -> Any:
    """An environment of verifiers, if it can be played here.

    Raises:
        ValueError: If it cannot, or is not found.
    """
    try:
        import verifiers

        kinds = (verifiers.MultiTurnEnv, verifiers.EnvGroup)
        from verifiers.envs import environment
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"verifiers' environments could not be imported: {named(error)}. Run: pip install "
            "'rllib-distrl[verifiers]'; version 0.4 has another kind of environments."
        ) from error
    search_working_directory()
    # Its environments take SIGINT and SIGTERM for themselves, and only a main thread may.
    kept = environment.signal
    environment.signal = SimpleNamespace(
        SIGINT=kept.SIGINT, SIGTERM=kept.SIGTERM, signal=lambda *_: None
    )
    try:
        with Seeded(0):  # Rows that are drawn at random are the same in each process.
            env = verifiers.load_environment(env_id, **kwargs)
            for part in _parts(env):
                part.build_dataset()
                part.build_eval_dataset()
    except (Exception, SystemExit) as error:
        raise ValueError(f"verifiers cannot load {env_id!r}: {named(error):.500}") from error
    finally:
        environment.signal = kept
    why = (_refusal(part, kinds) for part in _parts(env))
    if refused := next(filter(None, why), None):
        raise ValueError(f"The environment 'verifiers:{env_id}' cannot be used: {refused}.")
    return env


def _refusal(env: Any, kinds: tuple[type, ...]) -> str | None:
    """Why an environment cannot be played here, if it cannot."""
    classes = [kind.__name__ for kind in type(env).__mro__]
    name = classes[0]
    if not isinstance(env, kinds):
        return f"load_environment gave a {name}, which is no MultiTurnEnv"
    if known := next((kind for kind in classes if kind in _VERIFIERS_REFUSED), None):
        return (
            f"its {name} {_VERIFIERS_REFUSED[known]}. For tools that a model calls by text use "
            "distrl_envs:distrl/Tools-v0"
        )
    if env.tool_defs:
        return f"its {name} defines tools, which need an API's tool calls"
    if env.message_type != "chat":
        return f"its message_type is {env.message_type!r}, not 'chat'"
    if not env.score_rollouts:
        return "it does not score its rollouts (score_rollouts = False)"
    for rubric in _rubrics(env.rubric):
        judge = next((k.__name__ for k in type(rubric).__mro__ if "Judge" in k.__name__), None)
        if judge:
            return f"its {judge} asks a judge model over an API"
        if rubric.has_advantages:
            return f"its {type(rubric).__name__} gives advantages of its own"
        if rubric.has_group_rewards:
            return (
                f"rewards of its {type(rubric).__name__} compare the rollouts of a group, and an "
                "episode is graded by itself here"
            )
    return None


def _parts(env: Any) -> Iterator[Any]:
    """An environment, and those of a group."""
    yield env
    for inner in getattr(env, "envs", ()):
        yield from _parts(inner)


def _rubrics(rubric: Any) -> Iterator[Any]:
    """A rubric and all inside of it, those of a group's environments too."""
    yield rubric
    inner = [env.rubric for env in getattr(rubric, "env_map", {}).values()]
    for other in (*getattr(rubric, "rubrics", ()), *inner):
        yield from _rubrics(other)


def _watched(func: Callable[..., Any], failures: list[str]) -> Callable[..., Any]:
    """A reward function that notes what it raises, and what it returns that is no number."""
    name = getattr(func, "__name__", repr(func))

    async def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            return checked_number(result, "a reward of")
        except Exception as error:
            failures.append(f"{name}: {named(error)}")
            raise

    return wraps(func)(watched)


@lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all rollouts of a process, in a thread of its own.

    What an environment binds to a loop stays with it, and a caller may have a loop that runs.
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name=f"verifiers-{process}", daemon=True).start()
    return loop


@lru_cache(maxsize=1)
def _script() -> Any:
    """A client of verifiers' that answers with recorded completions; the last may be cut.

    When they are used up it says that the prompt is too long, which ends a rollout in order.
    """
    from verifiers import OverlongPromptError
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage

    class Script(Client[Any, Any, Any, Any]):
        def __init__(self, completions: Sequence[str], truncated: bool) -> None:
            super().__init__(None)
            self.completions, self.truncated = completions, truncated
            self.asked: list[Any] = []

        async def get_native_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Any:
            self.asked.append(list(prompt))
            turn = len(self.asked)
            if turn > len(self.completions):
                raise OverlongPromptError("There are no more recorded completions.")
            cut = self.truncated and turn == len(self.completions)
            message = ResponseMessage(
                content=self.completions[turn - 1],
                finish_reason="length" if cut else "stop",
                is_truncated=cut,
            )
            return Response(id=f"recorded-{turn}", created=0, model=model, message=message)

        def setup_client(self, config: Any) -> None:
            return None

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
            return messages, {}

        async def raise_from_native_response(self, response: Any) -> None:
            return None

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def close(self) -> None:
            return None

    return Script


def _plain(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """Roles and texts; content parts of texts alone are a text."""
    plain = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list | tuple) and all("text" in part for part in content):
            content = "".join(str(part["text"]) for part in content)
        plain.append((str(message["role"]), content))
    return plain
