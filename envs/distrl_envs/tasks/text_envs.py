"""Environments of others that read and write text, as tasks of several turns."""

from __future__ import annotations

import random
import re
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Text

from distrl_envs.task import (
    GENERATED_ROWS,
    SPLITS,
    TRAIN_SHARE,
    VALIDATION_SHARE,
    Draws,
    Grade,
    Problem,
    Reply,
    Task,
    TaskError,
    Turn,
    checked_number,
    split_of,
)
from distrl_envs.user_code import named, search_working_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE, SUCCESS = "score", "is_success"
"""Keys of an environment's info: a score beside the rewards, and whether the episode went well."""
INVALID = "invalid_action"
"""The status of a turn whose action the environment does not take."""
EMPTY = "[no text]"
"""Stands for an empty observation, which a chat could not show."""
TURNS = 16
"""Turns of an environment that names no limit of its own (our choice)."""
INVALID_PENALTY = 0.1
TOKENS = 512
"""Bounds the default limits with the small tokenizer."""
MOST_LISTED = 64
"""Characters of a charset that an instruction still lists."""
ACTION = re.compile(r"<action>((?:(?!<action>).)*?)(?:</action>|$)", re.DOTALL)
ASKED = "End each turn with your action between <action> and </action>"


class Step(NamedTuple):
    """What an environment made of an action.

    Attributes:
        text: What the model reads next.
        reward: Of this step.
        over: Whether the episode has ended.
        info: What the environment says beside it.
        valid: Whether the environment took the action.
    """

    text: str
    reward: float = 0.0
    over: bool = False
    info: Mapping[str, Any] = {}
    valid: bool = True


class ReplayedTask(Task):
    """An environment with a state, as a task that has none: every reply plays the episode again.

    To reply to turn t the environment is started anew for the row and given the actions of turns
    1..t, so that an episode of T turns costs T (T + 3) / 2 steps. That each step says what it said
    before is checked: an environment whose chance does not follow from its row is an error, not
    noise. **All samples of a row, and later visits to it, start alike and meet the same luck where
    they act alike**; samples of one row differ by what the model does. Luck varies over rows.

    Rewards of steps are rewards of turns. The status of an episode is `correct` or `wrong` as the
    environment says, or else as its return reaches `correct_from`; where a limit ended an episode
    that is not correct it is `too_long`.
    """

    names_answers = False
    library: ClassVar[str]
    chance_from: ClassVar[str]
    """Where all chance of a replay must come from, in words."""
    env_id: str
    invalid_penalty: float = 0.0
    correct_from: float
    _source: str = ""

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply:
        """What the environment says to the last turn, after all earlier ones.

        Raises:
            TaskError: If the environment says otherwise than it did before.
        """
        step = self._play(problem, turns)[-1]
        status = "ok" if step.valid else INVALID
        return Reply(step.text, reward=step.reward, over=step.over, status=status)

    def grading_key(self, problem: Problem) -> str:
        """As for any task; the source of the environment and `correct_from` belong to it."""
        own = f"{self._source}|{self.correct_from!r}|{self.invalid_penalty!r}".encode()
        return f"{super().grading_key(problem)}-{blake2b(own, digest_size=8).hexdigest()}"

    @abstractmethod
    def _steps(self, problem: Problem, actions: Sequence[str]) -> list[Step]:
        """The start of a row's episode and one step for each action, all from the beginning."""

    def _action(self, completion: str) -> str:
        return completion

    def _prompt(self, text: str) -> str:
        return text

    def _play(self, problem: Problem, turns: Sequence[Turn]) -> list[Step]:
        """The start and one step for each turn; what was replied before must come again."""
        steps = self._steps(problem, [self._action(turn.completion) for turn in turns])
        if problem.prompt and self._prompt(steps[0].text) != problem.prompt:
            raise self._changed(problem, "start", problem.prompt, steps[0].text)
        for number, (turn, step) in enumerate(zip(turns, steps[1:], strict=True), 1):
            if (said := turn.reply) is None:
                continue
            same_text = said.status == "cut" or step.text == said.text
            if not same_text or (step.reward, step.over) != (said.reward, said.over):
                before = f"{said.text} (reward {said.reward:g})"
                now = f"{step.text} (reward {step.reward:g})"
                raise self._changed(problem, f"turn {number}", before, now)
        return steps

    def _verdict(self, score: float, right: bool, truncated: bool) -> Grade:
        return Grade(score, "correct" if right else "too_long" if truncated else "wrong")

    def _changed(self, problem: Problem, where: str, before: str, now: str) -> TaskError:
        seed = f", seed {problem.data['seed']}" if isinstance(self, SeededTask) else ""
        return TaskError(
            f"The environment {self.name!r} is not the same when it is played again: on row "
            f"{problem.row}{seed}, {where}, it said {before!r:.200} and now {now!r:.200}. An "
            "episode is played again for each reply, so all of its chance must come from "
            f"{self.chance_from}, and nothing may be left over from earlier episodes."
        )


class SeededTask(ReplayedTask):
    """An environment that makes its episodes up from a seed; what `ReplayedTask` says holds.

    A row is a seed of the environment, and the hash of the seed decides the row's split.

    The action of a turn is what stands between its last `<action>` and `</action>`, else all of it,
    without white space around it. A turn whose action the environment does not take is spent: its
    reply says so, its status is `invalid_action`, its reward `-invalid_penalty`, and the episode
    goes on.

    The score at the end is 0, or `info["score"]` of the last step; `info["is_success"]` of that
    step says whether the episode is correct, and else the sum of all rewards and the score does. A
    turn that a limit cut short is not played.
    """

    chance_from = "the seed of reset"

    def __init__(
        self,
        env_id: str,
        *,
        split: str = "train",
        seed: int = 0,
        env_kwargs: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        invalid_penalty: float = INVALID_PENALTY,
        correct_from: float | None = None,
        instruction: str | None = None,
        slow: bool = False,
    ):
        """Makes the environment once, to see whether it can be played.

        Args:
            env_id: Its id.
            split: One of `SPLITS`.
            seed: Which seeds the rows are.
            env_kwargs: Further arguments of the library's `make`.
            max_turns: Turns of the model; by default the environment's own limit, or `TURNS`.
            invalid_penalty: What an action costs that is none. Where every step costs something,
                at least that: else a model learns not to act.
            correct_from: Least return of a correct episode, where the environment does not tell; by
                default its own threshold where it has one, or 1.
            instruction: Prompt around `{observation}`; it should ask for the action's tags.
            slow: Whether a reply may take longer than a few milliseconds; see `replies_slowly`.

        Raises:
            ValueError: For an unknown environment, one that is not played with texts by one player,
                and settings out of bounds.
        """
        if split not in SPLITS:
            raise ValueError(f"Got split {split!r}; it must be one of {', '.join(SPLITS)}.")
        if max_turns is not None and max_turns < 2:
            raise ValueError(f"Got max_turns={max_turns} for {env_id!r}; it must be at least 2.")
        if not 0 <= invalid_penalty < np.inf:
            raise ValueError(
                f"Got invalid_penalty={invalid_penalty}; it must be a finite number, at least 0."
            )
        if instruction is not None and "{observation}" not in instruction:
            raise ValueError(
                f"Got the instruction {instruction!r}; it must contain {{observation}} where the "
                "environment's first text goes."
            )
        self.name = f"{self.library}:{env_id}"  # as a recipe names it
        self.split, self.seed = split, int(seed)
        self.env_id, self.env_kwargs = env_id, dict(env_kwargs or {})
        self.invalid_penalty = float(invalid_penalty)
        self.replies_slowly = slow
        self._idle: list[Any] = []
        env = self._make()
        limit, threshold, asked = self._look(env)
        self.max_turns = max(2, limit or TURNS) if max_turns is None else int(max_turns)
        least = 1.0 if threshold is None else threshold
        self.correct_from = float(least if correct_from is None else correct_from)
        self._instruction = instruction or asked
        self._idle.append(env)
        while hasattr(env, "env"):  # below its wrappers
            env = env.env
        self._source = source_hash(type(env).__module__)

    def __getstate__(self) -> dict[str, Any]:
        """Environments stay where they are; each process makes its own."""
        return {**self.__dict__, "_idle": []}

    def __len__(self) -> int:
        """A fixed large number of rows."""
        return GENERATED_ROWS

    def describe_splits(self) -> str:
        """The shares of a hash of the environment's seed."""
        shares = (TRAIN_SHARE, VALIDATION_SHARE, 1.0 - TRAIN_SHARE - VALIDATION_SHARE)
        parts = [f"{name} {share:.0%}" for name, share in zip(SPLITS, shares, strict=True)]
        return f"Rows are seeds of the environment; a hash decides the split: {', '.join(parts)}"

    def problem(self, row: int) -> Problem:
        """The first observation under the first seed of the split at the row's address.

        Raises:
            ValueError: If there is no such row.
            TaskError: If the environment fails, or says what is no text.
        """
        self.check_row(row)
        draws = Draws(f"{self.name}|{self.seed}|{self.split}|{row}".encode())
        while True:
            seed = draws.below(1 << 7)  # 31 bits, which every generator takes
            for _ in range(2):
                seed = seed << 12 | draws.below(1 << 12)
            key = f"{self.name}|{seed}"
            if split_of(key) == self.split:
                break
        data = {"env": self.env_id, "env_kwargs": self.env_kwargs, "seed": seed}
        problem = Problem(int(row), "", data, key)
        return Problem(int(row), self._prompt(self._play(problem, ())[0].text), data, key)

    def instruction(self, problem: Problem) -> str:
        """The first observation, and how to answer."""
        return self._instruction.replace("{observation}", problem.prompt)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """Grades an episode of one turn, which the environment is asked about here."""
        turn = Turn(completion)
        if not truncated:
            turn = Turn(completion, self.respond(problem, [turn], Draws(b"")))
        return self.grade_turns(problem, [turn], truncated=truncated)

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """The score that the environment names, 0 without one; the status as the class says."""
        steps = self._play(problem, [turn for turn in turns if turn.reply is not None])
        info = next(step.info for step in reversed(steps) if step.valid)
        score = checked_number(info.get(SCORE, 0.0), f'info["{SCORE}"]')
        total = score + sum(step.reward for step in steps)
        return self._verdict(score, info.get(SUCCESS, total >= self.correct_from), truncated)

    @abstractmethod
    def _make(self) -> Any:
        """A new environment.

        Raises:
            ValueError: If it cannot be made.
        """

    @abstractmethod
    def _look(self, env: Any) -> tuple[int | None, float | None, str]:
        """An environment's own limit of turns and threshold of the return, and its instruction.

        Raises:
            ValueError: If it is of a kind that cannot be played here.
        """

    @abstractmethod
    def _start(self, env: Any, seed: int) -> Step:
        """Resets an environment."""

    @abstractmethod
    def _step(self, env: Any, action: str) -> Step:
        """Gives an environment an action."""

    def _action(self, completion: str) -> str:
        tagged = ACTION.findall(completion)
        return (tagged[-1] if tagged else completion).strip()

    def _steps(self, problem: Problem, actions: Sequence[str]) -> list[Step]:
        # An environment that has failed is not used again; list.pop and append are atomic.
        try:
            env = self._idle.pop()
        except IndexError:
            env = self._make()
        steps = [self._start(env, problem.data["seed"])]
        steps += [self._step(env, action) for action in actions]
        self._idle.append(env)
        return steps


class GymTask(SeededTask):
    """Any Gymnasium environment with `Text` observations and actions: `task = "gym:ID"`.

    What `SeededTask` says holds. `terminated` and `truncated` both end the episode. An action
    outside of the action space, by its length or characters, is not given to the environment. By
    default `max_turns` is the `max_episode_steps` and `correct_from` the `reward_threshold` with
    which the environment is registered. `gym:module:ID` imports the module that registers it.
    """

    library = "gym"

    def __init__(self, env_id: str, *, compact: bool = False, **common: Any):
        """Makes the environment and looks at its spaces.

        Args:
            env_id: As `gymnasium.make` takes it.
            compact: For the small tokenizer of the generated tasks: the prompt is the first
                observation and `:`, each reply an observation and `:`, and each word of theirs a
                token of that tokenizer. Without white space in the action's charset a turn's words
                are joined. The reply to an invalid action is `-`.
            **common: As for every `SeededTask`.

        Raises:
            ValueError: For an unknown environment, other spaces than `Text`, and charsets with
                characters that the small tokenizer does not have, where it is to be used.
        """
        self.compact = compact
        super().__init__(env_id, **common)
        if compact:
            self._fit_small()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The small tokenizer.

        Raises:
            ValueError: If the task is not compact.
        """
        if not self.compact:
            raise ValueError(
                f"The task {self.name!r} has no tokenizer of its own: got tokenizer=None. Pass a "
                "tokenizer, or the path or id of one; or set task_config.compact = true where the "
                "environment says nothing but words of the small tokenizer, such as 0..99."
            )
        from distrl_envs.tokenizers import small_tokenizer

        return small_tokenizer()

    def _make(self) -> gymnasium.Env[Any, Any]:
        search_working_directory()
        try:
            return gymnasium.make(self.env_id, **self.env_kwargs)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(
                f"Gymnasium cannot make the environment {self.env_id!r}: {named(error)}. Where a "
                "module of yours registers it, name that too: gym:my_module:ID."
            ) from error

    def _look(self, env: gymnasium.Env[Any, Any]) -> tuple[int | None, float | None, str]:
        spaces = {"observation": env.observation_space, "action": env.action_space}
        for what, space in spaces.items():
            if not isinstance(space, Text):
                raise ValueError(
                    f"Got the environment {self.env_id!r} with the {what} space {space!r:.200} "
                    f"({type(space).__name__}); gym:ID takes Text for observations and actions "
                    "alone. Put a gymnasium.ObservationWrapper or ActionWrapper around it that "
                    "writes and reads text, and register that."
                )
        self._observations: Text = env.observation_space  # type: ignore[assignment]
        self._actions: Text = env.action_space  # type: ignore[assignment]
        self._shown = shown_space(self._actions)
        spec, asked = env.spec, f"{{observation}}\n\n{ASKED}: {self._shown}."
        return spec and spec.max_episode_steps, spec and spec.reward_threshold, asked

    def _fit_small(self) -> None:
        """Checks charsets, and sets the limits in tokens of the small tokenizer."""
        allowed = set("".join(_small_words())) | {" "}
        for what, space in (("observation", self._observations), ("action", self._actions)):
            if foreign := sorted(space.character_set - allowed):
                raise ValueError(
                    f"Got compact = true, but the {what} space of {self.env_id!r} has the "
                    f"characters {''.join(foreign)!r:.60}, which the small tokenizer does not "
                    f"know; it has {''.join(sorted(allowed))!r}. Leave compact out and give "
                    "another tokenizer."
                )
        said = min(TOKENS, max(3, self._observations.max_length // 2 + 2))  # with the mark
        self.max_prompt_tokens = self.max_reply_tokens = said
        self.max_completion_tokens = min(TOKENS, self.max_turns * (self._actions.max_length + 1))

    def _start(self, env: gymnasium.Env[Any, Any], seed: int) -> Step:
        observation, info = env.reset(seed=seed)
        return Step(self._text(observation), info=info)

    def _step(self, env: gymnasium.Env[Any, Any], action: str) -> Step:
        if not self._actions.contains(action):
            said = f"[invalid action] It must be {self._shown}."
            return Step("-" if self.compact else said, -self.invalid_penalty, valid=False)
        observation, reward, terminated, truncated, info = env.step(action)
        reward = checked_number(reward, "a step's reward")
        return Step(self._text(observation), reward, bool(terminated or truncated), info)

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, str):
            raise TaskError(
                f"The environment {self.name!r} gave the observation {observation!r:.80} "
                f"({type(observation).__name__}); its space is Text, so it must be a str."
            )
        unknown = set(observation.split()) - _small_words() if self.compact else ()
        if unknown or (self.compact and not observation.strip()):
            raise TaskError(
                f"The environment {self.name!r} said {observation!r:.80}; with compact = true it "
                f"must say words of the small tokenizer, and {sorted(unknown)} are none (numbers "
                "are 0..99). Leave compact out and give another tokenizer."
            )
        return observation or EMPTY

    def _prompt(self, text: str) -> str:
        return f"{text.removesuffix(':').rstrip()} :" if self.compact else text

    def _action(self, completion: str) -> str:
        action = super()._action(completion)
        joined = self.compact and " " not in self._actions.character_set
        return "".join(action.split()) if joined else action


class TextArenaTask(SeededTask):
    """A game of TextArena for one player (Guertler et al. 2025): `task = "textarena:ID"`.

    What `SeededTask` says holds. A reply is what the game has said since the last one, without
    the player's own words; wrappers of observations, which repeat the whole game, are passed by,
    wrappers of actions are kept. The game's reward is that of its last turn. What a move must be is
    for the game to say: one that it calls invalid costs `invalid_penalty` beside what the game
    makes of it, and games end at a second one in succession. By default `max_turns` is the game's
    own, and one more for each turn that an invalid move may spend.

    TextArena's games draw from Python's global generators, which are seeded for a replay and put
    back behind it; replays of one process therefore wait for each other.
    """

    library = "textarena"

    def _make(self) -> Any:
        try:
            import textarena
        except ImportError as error:
            raise ValueError(
                f"textarena could not be imported: {named(error)}. "
                "Run: pip install 'rllib-distrl[textarena]'."
            ) from error
        try:
            return textarena.make(self.env_id, **self.env_kwargs)
        except (ValueError, ImportError, LookupError, OSError) as error:
            raise ValueError(
                f"TextArena cannot make the game {self.env_id!r}: {named(error):.300}"
            ) from error

    def _look(self, env: Any) -> tuple[int | None, float | None, str]:
        from textarena import SinglePlayerState

        refused = f"Got the game {self.env_id!r}; textarena:ID takes games for one player alone"
        try:
            with Seeded(0):
                env.reset(num_players=1, seed=0)
        except (AssertionError, KeyError, IndexError) as error:
            raise ValueError(f"{refused}, and this one says: {named(error):.200}") from error
        if not isinstance(env.state, SinglePlayerState):
            raise ValueError(f"{refused}, and this one keeps a {type(env.state).__name__}.")
        limit = env.state.max_turns
        return limit and 2 * limit, None, f"{{observation}}\n\n{ASKED}."

    def _steps(self, problem: Problem, actions: Sequence[str]) -> list[Step]:
        with Seeded(problem.data["seed"]):
            return super()._steps(problem, actions)

    def _start(self, env: Any, seed: int) -> Step:
        env.reset(num_players=1, seed=seed)
        return Step(self._heard(env)[0])

    def _step(self, env: Any, action: str) -> Step:
        over, _ = env.step(action)
        text, admonished = self._heard(env)
        if not over:
            return Step(text, -self.invalid_penalty * admonished, valid=not admonished)
        rewards, info = env.close()
        invalid = bool(info[0].get("invalid_move"))
        reward = (rewards or {}).get(0, 0.0)
        if invalid and isinstance(reward, str):
            # Countdown, Cryptarithm and Slitherlink (0.7.4) give reason and reward in wrong order.
            reward = float(info[0]["reason"].removeprefix("Invalid Move: "))
        reward = checked_number(reward, "a game's reward")
        return Step(text, reward - self.invalid_penalty * invalid, True, {}, not invalid)

    def _heard(self, env: Any) -> tuple[str, bool]:
        """What the game has said since it was last asked, and whether it refused a move."""
        import textarena

        kinds = textarena.ObservationType
        while isinstance(env, textarena.Wrapper):
            env = env.env
        _, messages = env.get_observation()
        said = [(text, kind) for _, text, kind in messages if kind != kinds.PLAYER_ACTION]
        text = "\n".join(str(text).strip() for text, _ in said)
        return text or EMPTY, any(kind == kinds.GAME_ADMIN for _, kind in said)


class Seeded:
    """Python's and NumPy's global generators from a seed, and as they were behind it.

    There is one of each in a process: who comes meanwhile waits.
    """

    _alone: ClassVar[Any] = Lock()

    def __init__(self, seed: int):
        """Takes a seed of up to 32 bits."""
        self._seed = seed

    def __enter__(self) -> None:
        self._alone.acquire()
        self._states = random.getstate(), np.random.get_state()
        random.seed(self._seed)
        np.random.seed(self._seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        self._alone.release()


def shown_space(space: Text) -> str:
    """What a text of a space may be, in words."""
    least, most = space.min_length, space.max_length
    length = f"{most}" if least == most else f"{least} to {most}"
    if len(space.character_set) > MOST_LISTED:
        return f"a text of {length} characters"
    return f"a text of {length} of the characters {space.characters!r}"


def _small_words() -> frozenset[str]:
    from distrl_envs.tokenizers import EOS, PAD, UNK, WORDS

    return frozenset(WORDS) - {PAD, EOS, UNK}


def source_hash(module: str) -> str:
    """Of a module's source."""
    file = getattr(sys.modules.get(module), "__file__", None)
    source = Path(file).read_bytes() if file else b""
    return blake2b(source, digest_size=8).hexdigest()
