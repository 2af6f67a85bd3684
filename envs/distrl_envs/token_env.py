"""Writing a completion token by token, as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, SupportsIndex

import gymnasium
import numpy as np
from gymnasium import spaces

from distrl_envs.privileged import Demonstrations, critic_numbers, critic_text, room_of_critic
from distrl_envs.prompts import Prompts
from distrl_envs.task import (
    Grade,
    Problem,
    Task,
    TaskError,
    Turn,
    checked_number,
    described,
    grades_of,
)
from distrl_envs.tasks import make_task
from distrl_envs.tokenizers import (
    check_stop,
    decode_completion,
    ends_with_stop,
    is_small,
    load_tokenizer,
)
from distrl_envs.turns import (
    REPLY_TOKENS,
    EnvReply,
    ReplyTokens,
    asked,
    at_turn,
    context_limit,
    grades_of_turns,
    interleaved,
    no_replies,
    takes_replies,
    transcript,
)
from distrl_envs.user_code import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESET_OPTIONS = frozenset(("row", "verdict", "replies", "address"))
OBS_MODES = ("token", "incremental", "context")
FOREIGN_TOKENIZER_LIMIT = 512
"""Default token limits of prompt and completion with a tokenizer that is not the task's own."""

Observation = int | np.ndarray
Info = dict[str, Any]


class Verdict(NamedTuple):
    """A graded completion: its text (with replies, the transcript) and its grade."""

    text: str
    grade: Grade


class TokenEnv(gymnasium.Env[Observation, int]):
    """An action is the next token; the reward is the grader's verdict at the end.

    An episode ends when an EOS token is chosen or a stop string is complete
    (`info["finish_reason"] == "stop"`) or when the completion holds `max_completion_tokens` tokens
    (`"length"`). The limit is part of the task: both are `terminated`, both are graded as they
    stand, and `truncated` is always False. Before the end the reward is 0 unless the task has
    step rewards.

    `reset` returns `info` with `prompt_ids`, `row` and `problem` (and, for a critic that is told
    one, `critic_text_ids`; with `demonstrations` `demonstration_ids`); the last step returns `info`
    with `finish_reason`, `grade` and `completion` (the decoded text).

    A task that replies (`has_turns`) is asked whenever EOS or a stop string ends a turn. Where it
    replies, the episode goes on: the reward is the reply's, the observation holds the reply's
    tokens, and `info` has them as `reply_ids`, their number `reply_tokens`, the `reply` and the
    number of the `turn` that it answers, from 1. The last step adds the reply's reward, if there is
    one, to the score, `info` has `turns`, and `completion` is the transcript. Its `finish_reason`
    is "stop" where the task or its reply ended the episode, "turns" after the last turn allowed,
    "length" where `max_completion_tokens` were sampled in all turns, and "context" where nothing
    fits into `max_context_tokens` any more.

    What is observed, by `obs_mode` (L tokens of prompt, completion and replies so far):

    * `token`: the last token, `Discrete(V)`; constant cost per step.
    * `incremental`: `Box` of 1 + max_prompt_tokens: how many tokens are new, then these tokens (the
      prompt at reset, one token after, with a reply's tokens behind it), zeros after them. With
      turns it is 1 + max(max_prompt_tokens, 1 + max_reply_tokens) wide.
    * `context`: `Box` of 1 + max_prompt_tokens + max_completion_tokens: L, then all L tokens, zeros
      after them. With turns it is 1 + max_context_tokens wide.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self,
        task: str | Task = "countdown",
        *,
        split: str | None = None,
        seed: int | None = None,
        task_config: Mapping[str, Any] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        obs_mode: str = "token",
        max_prompt_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        vocab_size: int | None = None,
        eos_token_ids: Collection[int] | None = None,
        window: int | None = None,
        on_long_prompt: str = "error",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
        max_turns: int | None = None,
        max_context_tokens: int | None = None,
        max_reply_tokens: int | None = None,
        critic_observation: str = "none",
        demonstrations: bool = False,
    ):
        """Builds the environment of a task.

        Args:
            task: A task, its name in `distrl_envs.tasks.TASKS`, or `module:class`.
            split: "train" (default), "validation" or "test"; only with a task's name.
            seed: Which problems a generating task makes (0 by default); only with a task's name.
                Which of them `reset` draws depends on its own seed.
            task_config: Further arguments of the task; only with a task's name.
            tokenizer: A tokenizer, its path or hub id, or None for the task's own small one. With
                any other than the small one the prompt is the task's instruction in plain language.
            obs_mode: What is observed; one of `OBS_MODES`.
            max_prompt_tokens: Longest prompt allowed; by default the task's, or 512 with another
                tokenizer than its own.
            max_completion_tokens: Where a completion ends, all turns together; defaults likewise.
            system_prompt: System message of the chat template, or text before the prompt, for a
                task without one of its own.
            prompt_template: Text around `{prompt}`; see `render_prompt`.
            vocab_size: Number of actions, where a model's vocabulary is larger than its
                tokenizer's.
            eos_token_ids: All tokens that end a completion; by default the tokenizer's EOS.
            window: Tokens that the model takes at most, prompt and completion together; lowers
                `max_prompt_tokens` where that would not leave room for a completion.
            on_long_prompt: What is done, before anything is sampled, where prompts of a task with
                a fixed set of rows are too long: "error", or "skip" to leave them out and print
                how many.
            chat_template_kwargs: Further variables of the chat template, such as Qwen3's
                `enable_thinking`.
            stop: Texts that end a completion too, with the token that completes one; the text stays
                part of what is graded. Engines sample on, and what follows is dropped. Those of
                the task come first.
            max_turns: Turns of the model at most, in a task that replies; by default the task's.
            max_context_tokens: Prompt, completion and replies together, in a task that replies; by
                default all that the other limits allow, and what `window` leaves of it.
            max_reply_tokens: Where a reply is cut, what the chat template puts around it included;
                by default the task's, or 256 with another tokenizer than its own.
            critic_observation: What a critic, and no policy, may see beside the tokens: "none",
                "state" (`Task.critic_observation`), "text" (`Task.critic_text`) or "stock" (the
                return so far, which whoever plays the episode adds up); nothing that `reset` and
                `step` let a policy observe depends on it.
            demonstrations: Whether `reset` tells learners a right completion of the problem,
                `Task.worked_solution`.

        Raises:
            ValueError: On any argument out of bounds, a task without problems, a stop string that
                the tokenizer cannot produce, a chat template to which replies cannot be
                appended, demonstrations of a task that has none or whose completions they do not
                fit, and if the tokenizer has no EOS token.
            TaskError: If a named task's own code fails while it is built.
        """
        if obs_mode not in OBS_MODES:
            raise ValueError(
                f"Got obs_mode {obs_mode!r}; it must be one of {', '.join(OBS_MODES)}."
            )
        self.task = _task(task, split, seed, task_config)
        if not len(self.task):
            raise ValueError(
                f"The task {self.task.name!r} holds no problems in its split {self.task.split!r}."
            )
        self.tokenizer = load_tokenizer(tokenizer, self.task)
        self.obs_mode = obs_mode
        self.stop = (*_stop(self.task.stop), *_stop(stop))
        check_stop(self.tokenizer, self.stop)
        self.compact = is_small(self.tokenizer)
        self.max_completion_tokens = self._limit("max_completion_tokens", max_completion_tokens)
        self.prompts = Prompts(
            self.task,
            self.tokenizer,
            self._limit("max_prompt_tokens", max_prompt_tokens),
            completion_tokens=self.max_completion_tokens,
            window=window,
            system_prompt=system_prompt,
            template=prompt_template,
            chat_template_kwargs=chat_template_kwargs,
            on_long=on_long_prompt,
        )
        self.task = self.prompts.task
        self.max_prompt_tokens = self.prompts.max_tokens
        self.system_prompt = self.prompts.system_prompt
        self.prompt_template = prompt_template
        self.chat_template_kwargs = chat_template_kwargs
        self.has_turns = takes_replies(self.task, max_turns, max_context_tokens, max_reply_tokens)
        self.max_turns = int(self.task.max_turns if max_turns is None else max_turns)
        self.max_reply_tokens = 0
        if self.has_turns:
            self.max_reply_tokens = self._limit("max_reply_tokens", max_reply_tokens, REPLY_TOKENS)
            self._reply_tokens = ReplyTokens(
                self.tokenizer, self.task.reply_roles, self.max_reply_tokens, chat_template_kwargs
            )
        most = self.max_prompt_tokens + self.max_completion_tokens
        most += (self.max_turns - 1) * self.max_reply_tokens
        self.max_context_tokens = context_limit(
            max_context_tokens, most, self.max_prompt_tokens, window
        )
        self.vocab_size = _vocab_size(len(self.tokenizer), vocab_size)
        self.eos_token_id = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.eos_token_ids = frozenset(eos_token_ids or (self.eos_token_id,))
        if not all(0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise ValueError(
                f"Got eos_token_ids {sorted(self.eos_token_ids)}; they must be in "
                f"0..{self.vocab_size - 1}."
            )
        self.action_space = spaces.Discrete(self.vocab_size)
        self.observation_space = self._observation_space()
        self._dense = self.task.has_step_reward
        self._prompt_ids: list[int] = []
        self._completion: list[int] = []
        self._start = 0  # where the turn begins,
        self._end = self.max_completion_tokens  # and where it ends if nothing else ends it
        self._turns: list[Turn] = []
        self._replies: list[EnvReply] = []
        self._known: Sequence[EnvReply] | None = None  # replies that were given beforehand
        self._address: Sequence[int] | None = None  # of what the task replies by chance
        self._problem: Problem | None = None  # None unless an episode is under way
        self._verdict: Verdict | None = None  # of a completion that was graded beforehand
        self.critic_observation = critic_observation
        self.critic_room = room_of_critic(
            self.task,
            critic_observation,
            replies=self.has_turns,
            context_tokens=self.max_context_tokens,
            window=window,
        )
        self.demonstrations = bool(demonstrations)
        if self.demonstrations:
            if self.has_turns:
                raise ValueError(
                    f"Got demonstrations=True, but the task {self.task.name!r} replies, and only "
                    "completions of one turn can be shown. Use another method."
                )
            self._demonstrations = Demonstrations(
                self.prompts, self.tokenizer, self.max_completion_tokens, self.ends_turn
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Starts an episode on `options["row"]`, or on a row that the own generator draws.

        Where the completion is known beforehand, `options["verdict"]` is what `grade_many` made of
        it: the last step then reports that verdict instead of grading again. In a task that replies
        `options["replies"]` are then all that was replied, and the task is not asked again; without
        a verdict it is asked after the last of them. `options["address"]` (seed, row, sample,
        visit) names the randomness of its replies, which the own generator draws otherwise.

        Raises:
            ValueError: If the row does not exist, its prompt is too long, or an option is unknown.
        """
        super().reset(seed=seed)
        options = options or {}
        row = self._row(options)
        problem, self._prompt_ids = self.prompts.served(row)
        self._completion = []
        self._verdict = options.get("verdict")
        self._problem = problem
        if self.has_turns:
            self._reset_turns(options.get("replies"), options.get("address"))
        elif options.get("replies"):
            raise ValueError(no_replies(self.task, "the reset option replies"))
        info = {"prompt_ids": list(self._prompt_ids), "row": row, "problem": problem}
        if self.critic_observation == "text":
            info["critic_text_ids"] = self.critic_text_ids(row)
        if self.demonstrations:
            info["demonstration_ids"] = self.demonstration_ids(row)
        return self._observe(self._prompt_ids), info

    def step(self, action: SupportsIndex) -> tuple[Observation, float, bool, bool, Info]:
        """Appends a token.

        Raises:
            ValueError: If the action is not a token id.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        try:
            token = index(action)
        except TypeError:
            token = -1
        if self._problem is None or not 0 <= token < self.vocab_size:
            self._refuse(action)
        completion = self._completion
        completion.append(token)
        observation = token if self.obs_mode == "token" else self._observe([token])
        reward = self._step_reward(completion) if self._dense else 0.0
        stopped = self.ends_turn(completion, self._start)
        if not stopped and len(completion) < self._end:
            return observation, reward, False, False, {}
        if self.has_turns:
            return self._end_turn(token, stopped, reward)
        text = self._text(completion) if self._verdict is None else ""
        score, info = self._finish("stop" if stopped else "length", text)
        return observation, reward + score, True, False, info

    def _reset_turns(self, known: Sequence[EnvReply] | None, address: Sequence[int] | None) -> None:
        self._turns, self._replies, self._known, self._address = [], [], known, address
        self._start, self._end = 0, self.room(len(self._prompt_ids), 0)

    def _end_turn(
        self, token: int, ended: bool, reward: float
    ) -> tuple[Observation, float, bool, bool, Info]:
        """What a step returns after which no token of the same turn may follow."""
        completion, replies = self._completion, self._replies
        known = self._known[len(replies) :] if self._known else ()
        said = known[0].said if known and known[0].at == len(completion) else None
        said = self._text(completion[self._start :]) if said is None else said
        self._turns.append(Turn(said))
        made = self._next_reply() if ended else None
        info: Info = {}
        if made is not None:
            reward += made.reply.reward
            replies.append(made)
            self._turns[-1] = replace(self._turns[-1], reply=made.reply)
            info = {"reply": made.reply}
            if made.finish is None:
                at = self._start = len(completion)
                self._end = at + self.room(len(self._prompt_ids), at, replies)
                info["reply_ids"] = list(made.ids)
                info["reply_tokens"] = len(made.ids)
                info["turn"] = len(replies)
                return self._observe([token, *made.ids]), reward, False, False, info
        turns = self._turns
        score, last = self._finish(self.finish_reason(completion, replies), turns)
        info.update(last, turns=turns)
        return self._observe([token]), reward + score, True, False, info

    def _next_reply(self) -> EnvReply | None:
        """What is replied to the turn that has ended: as it is known, or as the task says."""
        number, at = len(self._replies), len(self._completion)
        known = () if self._known is None else self._known
        if number < len(known):
            if known[number].at == at:
                return known[number]
            raise ValueError(
                f"Turn {number + 1} ended after {at} tokens, but the reply known beforehand stands "
                f"after {known[number].at}: replies and completion belong to different episodes."
            )
        if self._known is not None and self._verdict is not None:
            return None  # The whole episode is known, and ends here.
        problem = self._problem
        assert problem is not None
        if self._address is None:
            self._address = (int(self.np_random.integers(2**62)), problem.row, 0, 0)
        episode = self._prompt_ids, self._completion, self._replies
        return self._reply(problem, self._turns, *episode, self._address)

    def reply_to(
        self,
        row: int,
        completion: Sequence[int],
        replies: Sequence[EnvReply],
        address: Sequence[int],
    ) -> EnvReply | None:
        """What the environment answers to a turn that has just ended, as `step` would say it.

        It depends on the arguments alone, and changes nothing.

        Args:
            row: The row of the problem.
            completion: All that was sampled in the episode; its last token ended a turn.
            replies: What was replied before.
            address: Names the randomness: seed, row, sample, visit.

        Returns:
            The reply, whose `finish` says whether the model goes on; None where the task does not
            reply, which ends the episode too.

        Raises:
            ValueError: If the row does not exist, or the turn has not ended.
            TaskError: If the task fails, or returns what is no reply.
        """
        problem, prompt = self.prompts.served(row)
        start = replies[-1].at if replies else 0
        if len(completion) <= start or not self.ends_turn(completion, start):
            raise ValueError(
                f"The model's turn {len(replies) + 1} of row {row} has not ended: a reply comes "
                "after an EOS token or a stop string."
            )
        if not self.has_turns:
            return None
        turns = self.turns_of(completion, replies)
        return self._reply(problem, turns, prompt, completion, replies, address)

    def _reply(
        self,
        problem: Problem,
        turns: Sequence[Turn],
        prompt: Sequence[int],
        completion: Sequence[int],
        replies: Sequence[EnvReply],
        address: Sequence[int],
    ) -> EnvReply | None:
        at = len(completion)
        reply = asked(self.task, problem, list(turns), address)
        if reply is None:
            return None
        said = turns[-1].completion
        if reply.over:
            return EnvReply(at, (), reply, "stop", said)
        if len(turns) >= self.max_turns:
            return EnvReply(at, (), reply, "turns", said)
        if at >= self.max_completion_tokens:
            return EnvReply(at, (), reply, "length", said)
        end = completion[-1] if completion[-1] in self.eos_token_ids else None
        try:
            ids, shown = self._reply_tokens.encode(reply, end, prompt[-1])
        except ValueError as error:
            what = at_turn(self.task, problem, len(turns))
            raise TaskError(f"{what} cannot be shown to the model: {error}") from error
        made = EnvReply(at, ids, shown, said=said)
        if not self.room(len(prompt), at, [*replies, made]):
            return EnvReply(at, (), reply, "context", said)
        return made

    def room(
        self,
        prompt_length: int,
        completion: Sequence[int] | int,
        replies: Sequence[EnvReply] = (),
    ) -> int:
        """How many more tokens may be sampled in an episode, over all its turns.

        Args:
            prompt_length: Tokens of the prompt.
            completion: What was sampled so far, or how many tokens.
            replies: What was replied so far.
        """
        sampled = completion if isinstance(completion, int) else len(completion)
        taken = prompt_length + sampled + sum(len(reply.ids) for reply in replies)
        left = self.max_context_tokens - taken
        return max(0, min(self.max_completion_tokens - sampled, left))

    def turns_of(self, completion: Sequence[int], replies: Sequence[EnvReply]) -> list[Turn]:
        """The turns of an episode as text; the last has no reply where none has come (yet).

        Args:
            completion: All that was sampled.
            replies: What was replied, in order.
        """
        turns, start = [], 0
        for reply in replies:
            said = self._text(completion[start : reply.at]) if reply.said is None else reply.said
            turns.append(Turn(said, reply.reply))
            start = reply.at
        if start < len(completion) or not turns:
            turns.append(Turn(self._text(completion[start:])))
        return turns

    def finish_reason(self, completion: Sequence[int], replies: Sequence[EnvReply]) -> str:
        """Why an episode of turns is over, as its last step says.

        Args:
            completion: All that was sampled.
            replies: What was replied, in order.
        """
        if replies and replies[-1].finish is not None:
            return replies[-1].finish
        start = replies[-1].at if replies else 0
        if len(completion) > start and self.ends_turn(completion, start):
            return "stop"
        return "length" if len(completion) >= self.max_completion_tokens else "context"

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The prompt of a problem as tokens.

        Raises:
            ValueError: If it has more than `max_prompt_tokens`.
        """
        return self.prompts.ids(problem)

    def grade_many(
        self,
        rows: Sequence[int],
        completions: Sequence[Sequence[int]],
        replies: Sequence[Sequence[EnvReply]] | None = None,
    ) -> list[Verdict]:
        """Grades completions of whole rows at once, as the last step of each would.

        Tasks with worker processes grade them in parallel.

        Args:
            rows: The row of each completion.
            completions: Token ids, up to the EOS or the length limit; those of all turns.
            replies: What was replied to each; none by default.

        Raises:
            ValueError: If a row does not exist, or there are replies in a task without.
            TaskError: If the task fails, or returns what is no grade.
        """
        problems = {row: self.prompts.served(row)[0] for row in set(rows)}
        if self.has_turns:
            replies = [()] * len(completions) if replies is None else replies
            return self._grade_turns([problems[row] for row in rows], completions, replies)
        if replies is not None and any(replies):
            raise ValueError(no_replies(self.task, "replies"))
        texts = [self._text(completion) for completion in completions]
        truncated = [not self.ends_turn(completion) for completion in completions]
        grades = grades_of(self.task, [problems[row] for row in rows], texts, truncated)
        return [Verdict(text, grade) for text, grade in zip(texts, grades, strict=True)]

    def _grade_turns(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Sequence[int]],
        replies: Sequence[Sequence[EnvReply]],
    ) -> list[Verdict]:
        episodes = list(zip(completions, replies, strict=True))
        turns = [self.turns_of(*episode) for episode in episodes]
        truncated = [self.finish_reason(*episode) != "stop" for episode in episodes]
        grades = grades_of_turns(self.task, problems, turns, truncated)
        return [Verdict(transcript(t), grade) for t, grade in zip(turns, grades, strict=True)]

    def critic_observations(
        self, row: int, completion: Sequence[int], replies: Sequence[EnvReply] = ()
    ) -> np.ndarray:
        """What the task tells a critic of the state before each sampled token.

        Args:
            row: The row of the problem.
            completion: All T tokens that were sampled.
            replies: What was replied, in order.

        Returns:
            (T, n) float32, a column for each of the task's `critic_numbers`.

        Raises:
            TaskError: If the task fails, or gives other than n finite numbers per token.
        """
        problem, _ = self.prompts.served(row)
        return critic_numbers(self.task, problem, completion, replies, self._text)

    def critic_text_ids(self, row: int) -> list[int]:
        """The task's text for the critic as tokens, cut where the model's window asks for it."""
        problem, _ = self.prompts.served(row)
        return critic_text(self.task, problem, self.tokenizer, self.critic_room)

    def demonstration_ids(self, row: int) -> np.ndarray:
        """The task's worked solution of a row as the tokens of a completion, (T,) int64.

        Raises:
            ValueError: If it has more than `max_completion_tokens`.
            TaskError: If the task fails, or returns no text.
        """
        return self._demonstrations.ids(row)

    def _step_reward(self, completion: list[int]) -> float:
        assert self._problem is not None
        try:
            return checked_number(self.task.step_reward(self._problem, completion), "a step reward")
        except TaskError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{described(self.task, 'step_reward')} on row {self._problem.row}"
            at = f"after {len(completion)} tokens"
            raise TaskError(f"{what} {at} failed: {named(error)}") from error

    def _row(self, options: dict[str, Any]) -> int:
        unknown = set(options) - RESET_OPTIONS
        if unknown:
            raise ValueError(
                f"Got the reset options {sorted(unknown)}; there are {sorted(RESET_OPTIONS)}."
            )
        if "row" in options:
            return int(options["row"])
        return int(self.np_random.integers(len(self.task)))

    def _finish(self, reason: str, said: str | Sequence[Turn]) -> tuple[float, Info]:
        """Score and info of an episode, whose text or turns are graded unless they are already."""
        assert self._problem is not None
        if self._verdict is None:
            cut = [reason != "stop"]
            if isinstance(said, str):
                grades = grades_of(self.task, [self._problem], [said], cut)
                self._verdict = Verdict(said, grades[0])
            else:
                grades = grades_of_turns(self.task, [self._problem], [said], cut)
                self._verdict = Verdict(transcript(said), grades[0])
        self._problem = None
        info = {
            "finish_reason": reason,
            "grade": self._verdict.grade,
            "completion": self._verdict.text,
        }
        return self._verdict.grade.score, info

    def length_until_stop(self, completion: Sequence[int]) -> int:
        """How many tokens of a sampled turn belong to it: up to its first stop string."""
        if not self.stop:
            return len(completion)
        ids = list(completion)
        lengths = range(1, len(ids) + 1)
        return next((n for n in lengths if self.ends_turn(ids[:n])), len(ids))

    def ends_turn(self, completion: Sequence[int], start: int = 0) -> bool:
        """Whether the last token ends the turn that begins at `start`, which did not end before."""
        if completion[-1] in self.eos_token_ids:
            return True
        return bool(self.stop) and ends_with_stop(self.tokenizer, completion, self.stop, start)

    def _text(self, completion: Sequence[int]) -> str:
        return decode_completion(self.tokenizer, completion, self.eos_token_ids)

    def _observe(self, new: list[int]) -> Observation:
        if self.obs_mode == "token":
            return new[-1]
        if self.obs_mode == "context":
            new = interleaved(self._prompt_ids, self._completion, self._replies)
        assert isinstance(self.observation_space, spaces.Box)
        observation = np.zeros(self.observation_space.shape, dtype=np.int64)
        observation[0] = len(new)
        observation[1 : 1 + len(new)] = new
        return observation

    def _observation_space(self) -> spaces.Space[Any]:
        if self.obs_mode == "token":
            return spaces.Discrete(self.vocab_size)
        width = self.max_prompt_tokens
        if self.obs_mode == "context":
            width = self.max_context_tokens
        elif self.has_turns:
            width = max(width, 1 + self.max_reply_tokens)
        high = np.full(1 + width, self.vocab_size - 1, dtype=np.int64)
        high[0] = width
        return spaces.Box(np.zeros_like(high), high, dtype=np.int64)

    def _limit(self, name: str, value: int | None, foreign: int = FOREIGN_TOKENIZER_LIMIT) -> int:
        if value is None:
            return getattr(self.task, name) if self.compact else foreign
        if value < 1:
            raise ValueError(f"Got {name}={value}; it must be at least 1.")
        return int(value)

    def _refuse(self, action: Any) -> NoReturn:
        if self._problem is None:
            raise gymnasium.error.ResetNeeded("The episode is over: call reset() before step().")
        raise ValueError(f"Got the action {action!r}; it must be in 0..{self.vocab_size - 1}.")


def _task(
    task: str | Task, split: str | None, seed: int | None, task_config: Mapping[str, Any] | None
) -> Task:
    given = {"split": split, "seed": seed, **(task_config or {})}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(task, str):
        return make_task(task, **given)
    if not isinstance(task, Task):
        raise ValueError(f"Got task {task!r}; it must be a Task or the name of one.")
    if given:
        raise ValueError(
            f"Got a finished task and {sorted(given)}: set these on the task itself, "
            "or name the task."
        )
    return task


def _stop(stop: Sequence[str]) -> tuple[str, ...]:
    listed = isinstance(stop, (list, tuple)) and all(isinstance(x, str) and x for x in stop)
    if not listed:
        raise ValueError(
            f'Got stop={stop!r}; it must be a list of texts that are not empty, as ["</answer>"].'
        )
    return tuple(stop)


def _vocab_size(tokens: int, vocab_size: int | None) -> int:
    if vocab_size is None:
        return tokens
    if vocab_size < tokens:
        raise ValueError(
            f"Got vocab_size {vocab_size}, but the tokenizer has {tokens} tokens. "
            "Give the size of the model's vocabulary, or leave it out."
        )
    return int(vocab_size)
