"""Any task of one turn, with tools that the model may call before it answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from distrl_envs.task import Draws, Grade, Problem, Reply, Task, Turn, grades_of
from distrl_envs.tasks import make_task
from distrl_envs.tools import Call, make_tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING = re.compile(r"<tool\s+([^<>\s]+)\s*>")
CLOSING = "</tool>"
MOST_CALLS = 64
SHOWN_NAME = 40
"""Characters of a name that does not exist in the reply that says so."""


class ToolTask(Task):
    """A task whose model may call tools, `<tool python>print(6 * 7)</tool>`, before it answers.

    A turn that ends with `</tool>` is a call: of what stands last in it, one call a turn. The reply
    is the tool's result; each call costs `call_cost`. The first other turn is the answer, graded
    as the task around which this one stands grades it. An episode whose last turn is a call has
    none: `no_answer`, 0. Statuses of replies are those of the tools' results, `unknown_tool`,
    `malformed` (a call that names no tool) and `no_calls_left`.
    """

    stop = (CLOSING,)

    def __init__(
        self,
        task: str | Task,
        tools: Sequence[str] = ("python",),
        *,
        calls: int = 4,
        call_cost: float = 0.0,
        tool_timeout: float = 5.0,
        reply_characters: int = 800,
        reply_role: str = "tool",
        **config: Any,
    ):
        """Builds the task and its tools; nothing is started.

        Args:
            task: A task, or the name of one as in `make_task`.
            tools: Names as in `make_tool`.
            calls: How many calls an episode may have.
            call_cost: What each takes from the reward.
            tool_timeout: Seconds for a call.
            reply_characters: Most of a result, its start and its end; the environment's
                `max_reply_tokens` holds besides.
            reply_role: Who replies, as the chat template names it.
            **config: Arguments of the named task.

        Raises:
            ValueError: If a tool or the task is unknown, an argument is out of bounds, two tools
                have one name, or the task has turns or step rewards of its own.
        """
        if isinstance(task, Task) and config:
            raise ValueError(
                f"Got a finished task and {sorted(config)}: set these on the task itself, or name "
                "the task."
            )
        self.inner = task if isinstance(task, Task) else make_task(task, **config)
        if self.inner.max_turns > 1 or self.inner.has_step_reward:
            what = "turns" if self.inner.max_turns > 1 else "step rewards"
            raise ValueError(
                f"Got the task {self.inner.name!r}, which has {what} of its own; tools go with "
                "tasks whose episodes are one completion that is graded at its end."
            )
        if isinstance(tools, str) or not tools:
            raise ValueError(f'Got tools={tools!r}; it must be a list of names, as ["python"].')
        if not 1 <= calls <= MOST_CALLS:
            raise ValueError(f"Got calls={calls}; it must be in 1..{MOST_CALLS}.")
        if not 0.0 <= call_cost <= 1.0:
            raise ValueError(f"Got call_cost={call_cost}; it must be in 0..1.")
        limits = {"timeout": tool_timeout, "characters": reply_characters}
        made = [make_tool(name, **limits) for name in tools]
        self.tools = {tool.name: tool for tool in made}
        if len(self.tools) < len(made):
            raise ValueError(f"Got tools={list(tools)}; their names must differ.")
        self.calls, self.call_cost = calls, float(call_cost)
        self.max_turns = calls + 1
        self.reply_roles = (reply_role,)
        self.name = f"{self.inner.name}+tools"
        self.split = self.inner.split
        self.names_answers = self.inner.names_answers
        self.system_prompt = self.inner.system_prompt
        self.max_prompt_tokens = self.inner.max_prompt_tokens
        self.max_completion_tokens = self.inner.max_completion_tokens

    def __len__(self) -> int:
        """The task's own rows."""
        return len(self.inner)

    def problem(self, row: int) -> Problem:
        """The task's own problem."""
        return self.inner.problem(row)

    def context(self, problem: Problem) -> Sequence[Mapping[str, str]]:
        """The task's own messages."""
        return self.inner.context(problem)

    def instruction(self, problem: Problem) -> str:
        """The task's own, and how to call which tools."""
        listed = "\n".join(f"- {name}: {tool.description}." for name, tool in self.tools.items())
        times = "once" if self.calls == 1 else f"up to {self.calls} times"
        cost = f" Each call costs {self.call_cost:g} of your score." if self.call_cost else ""
        return (
            f"{self.inner.instruction(problem)}\n\nBefore you answer you may call tools, {times}: "
            f"write <tool NAME>input{CLOSING}, with one of the names below, and stop there; the "
            f"result follows.{cost} A turn without a call is your answer.\n{listed}"
        )

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply | None:
        """The result of the call that ends the turn; None where the turn is the answer."""
        call = called(turns[-1].completion)
        if call is None:
            return None
        role = self.reply_roles[0]
        if len(turns) > self.calls:
            return Reply("[no calls are left]", role, over=True, status="no_calls_left")
        text, status = self._result(call, turns[:-1])
        if len(turns) == self.calls:
            text += "\n[no calls are left: answer now]"
        return Reply(text, role, 0.0 - self.call_cost, status=status)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The task's own grade of an answer; 0.0 for a call."""
        return self.grade_many([problem], [completion], [truncated])[0]

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch of last turns, the answers among them as the task does."""
        answers = [i for i, text in enumerate(completions) if called(text) is None]
        grades = [Grade(0.0, "too_long" if cut else "no_answer") for cut in truncated]
        graded = grades_of(
            self.inner,
            [problems[i] for i in answers],
            [completions[i] for i in answers],
            [truncated[i] for i in answers],
        )
        for i, grade in zip(answers, graded, strict=True):
            grades[i] = grade
        return grades

    def without(self, rows: Collection[int]) -> Task:
        """The same without some of the task's own rows."""
        rest = copy.copy(self)
        rest.inner = self.inner.without(rows)
        return rest

    def describe_splits(self) -> str:
        """The task's own."""
        return self.inner.describe_splits()

    def grading_key(self, problem: Problem) -> str:
        """The task's own key beside that of this class."""
        keys = f"{super().grading_key(problem)}|{self.inner.grading_key(problem)}"
        return blake2b(keys.encode(), digest_size=8).hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The task's own."""
        return self.inner.tokenizer()

    def _result(self, call: tuple[str, str], before: Sequence[Turn]) -> tuple[str, str]:
        """Text and status of a call."""
        name, text = call
        there = f"the tools are: {', '.join(self.tools)}"
        if not name:
            return f"[no call: write <tool NAME>input{CLOSING}; {there}]", "malformed"
        if name not in self.tools:
            return f"[unknown tool {name[:SHOWN_NAME]!r}; {there}]", "unknown_tool"
        earlier = [
            Call(one[1], turn.reply.status)
            for turn in before
            if turn.reply is not None and (one := called(turn.completion)) and one[0] == name
        ]
        return self.tools[name](text, earlier)


def called(completion: str) -> tuple[str, str] | None:
    """Name and input of the call that ends a turn; the name is "" where the call has none.

    None where the turn does not end with a call.
    """
    text = completion.rstrip()
    if not text.endswith(CLOSING):
        return None
    last = text.removesuffix(CLOSING).rpartition(CLOSING)[2]
    opened = OPENING.search(last)
    return (opened[1], last[opened.end() :]) if opened else ("", "")
