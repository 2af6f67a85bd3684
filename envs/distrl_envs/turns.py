"""Between two turns of the model: asking the task for a reply, and the reply as tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from distrl_envs.task import (
    Draws,
    Grade,
    Problem,
    Reply,
    Task,
    TaskError,
    Turn,
    ask,
    check_grade,
    described,
    grades_of,
)
from distrl_envs.tokenizers import (
    EOS,
    MARK_END,
    MARK_START,
    PAD,
    UNDECODABLE,
    UNK,
    VOCABULARY,
    encode_marked,
    is_small,
    mark_special,
    rendered_chat,
)
from distrl_envs.user_code import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLY_TOKENS = 256
"""Default limit of a reply with a tokenizer that is not the task's own."""

CUT = "\n[cut]"
"""What stands at the end of a reply that was too long."""

# No reply needs more: what is beyond is cut before it is encoded, so that a megabyte costs little.
_CHARACTERS_PER_TOKEN = 64

# Games say the same again and again.
_REMEMBERED = 256
_CONTROL = (PAD, EOS, UNK)
_ASKED, _ANSWERED, _REPLIED, _THOUGHT = "Question-7", "Answer-7", "Reply-7", "Thought-7"


class EnvReply(NamedTuple):
    """A reply as tokens, and where it stands.

    Attributes:
        at: How many tokens of the episode were sampled before it.
        ids: Its tokens with all that the chat template puts between the model's last token and the
            place where its next turn begins; none where the episode is over.
        reply: What the task said.
        finish: Why the episode is over: "stop" (the reply says so), "turns" (it was the last turn
            allowed), "length" (no more tokens may be sampled) or "context" (nothing fits behind
            the reply); None where the model goes on.
        said: The turn that is answered, decoded; None where nobody has yet.
    """

    at: int
    ids: tuple[int, ...]
    reply: Reply
    finish: str | None = None
    said: str | None = None


def interleaved(
    prompt: Sequence[int], completion: Sequence[int], replies: Sequence[EnvReply]
) -> list[int]:
    """All tokens of an episode, in order: the prompt, then what was sampled and replied."""
    ids, start = list(prompt), 0
    for reply in replies:
        ids += completion[start : reply.at]
        ids += reply.ids
        start = reply.at
    ids += completion[start:]
    return ids


class ReplyTokens:
    """Replies as tokens: what a chat template puts behind an answer, without the answer.

    What was sampled is never encoded again. A template may render the answers of earlier turns
    otherwise than they were sampled (without their thinking, say): the model then goes on from what
    it has written, and only what stands around the reply is the template's.

    Attributes:
        extends: Whether the template leaves prompt and answer as they were when a reply comes, so
            that the tokens of an episode are those of its rendered messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        roles: Collection[str],
        limit: int,
        variables: Mapping[str, Any] | None = None,
    ):
        """Tries the template on a short conversation, before anything is sampled.

        Args:
            tokenizer: What encodes.
            roles: Who replies.
            limit: Most tokens of a reply, the template's own included.
            variables: Further variables of the chat template.

        Raises:
            ValueError: If the template refuses a role, drops a reply, or renders a second one
                otherwise than the first; or if the limit leaves no room for a reply.
        """
        self._tokenizer = tokenizer
        self._limit = limit
        self._variables = variables
        self._remembered: dict[tuple[str, str, int | None], tuple[int, ...]] = {}
        self._small = is_small(tokenizer)
        self._chat = not self._small and bool(getattr(tokenizer, "chat_template", None))
        self.extends = True
        for role in roles if self._chat else ():
            self._check(role)
        self._check_limit(roles)

    def encode(
        self, reply: Reply, ended_by: int | None, mark: int | None = None
    ) -> tuple[tuple[int, ...], Reply]:
        """The tokens of a reply, and the reply as the model reads it.

        Args:
            reply: What the task said. A text of more tokens than the limit is cut, ends with a mark
                that says so, and gets the status "cut".
            ended_by: The EOS token that ended the turn, None after a stop string; a template that
                puts the same token there does not repeat it.
            mark: For the small tokenizer, the token that ends a prompt and so a reply.

        Raises:
            ValueError: If the chat template refuses the role or drops the text.
        """
        if self._small:
            return self._small_ids(reply, mark)
        text = reply.text.replace(MARK_START, UNDECODABLE).replace(MARK_END, UNDECODABLE)
        text = text.encode("utf-8", "replace").decode()
        kept = text[: self._limit * _CHARACTERS_PER_TOKEN]
        cut = kept != text
        while True:
            shown = kept + CUT if cut else text
            ids = self._ids(shown, reply.role, ended_by)
            if len(ids) <= self._limit:
                return ids, replace(reply, text=shown, status="cut") if cut else reply
            cut, kept = True, kept[: min(len(kept) - 1, len(kept) * self._limit // len(ids))]

    def _small_ids(self, reply: Reply, mark: int | None) -> tuple[tuple[int, ...], Reply]:
        """Words and the mark; texts of control tokens are unknown words."""
        unknown = VOCABULARY[UNK]
        words = reply.text.split()
        ids = [VOCABULARY.get(word, unknown) if word not in _CONTROL else unknown for word in words]
        if mark is not None and ids[-1:] == [mark]:
            ids.pop()
        behind = [] if mark is None else [mark]
        if len(ids) + len(behind) <= self._limit:
            return (*ids, *behind), reply
        kept = self._limit - 1 - len(behind)
        cut = replace(reply, text=" ".join([*words[:kept], UNK]), status="cut")
        return (*ids[:kept], unknown, *behind), cut

    def _ids(self, text: str, role: str, ended_by: int | None) -> tuple[int, ...]:
        key = (text, role, ended_by)
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._encoded(*key)
        return self._remembered[key]

    def _encoded(self, text: str, role: str, ended_by: int | None) -> tuple[int, ...]:
        marked = mark_special(self._tokenizer, text)
        between = self._increment(marked, role) if self._chat else f"\n\n{marked}\n\n"
        if ended_by is not None:
            end = str(self._tokenizer.convert_ids_to_tokens(ended_by))
            if between.lstrip().startswith(end):
                between = between.lstrip().removeprefix(end)
        return tuple(encode_marked(self._tokenizer, between, special=False))

    def _increment(self, text: str, role: str) -> str:
        """All that the template puts behind an answer when a reply has come."""
        chat = self._rendered([("user", _ASKED), ("assistant", _ANSWERED), (role, text)])
        _, found, behind = chat.partition(_ANSWERED)
        if not found:
            raise ValueError(
                "The tokenizer's chat template drops the assistant's message, so turns cannot "
                "follow each other. Choose a tokenizer with another template."
            )
        return behind

    def _rendered(self, turns: Sequence[tuple[str, str]]) -> str:
        from jinja2.exceptions import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return rendered_chat(self._tokenizer, messages, self._variables)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"The tokenizer's chat template refuses a reply in the role {turns[-1][0]!r}: "
                f"{error}. Reply in a role that it takes, such as 'user' (Reply.role, and "
                "reply_roles of the task)."
            ) from error

    def _check(self, role: str) -> None:
        increment = self._increment(_REPLIED, role)
        if _REPLIED not in increment:
            raise ValueError(
                f"The tokenizer's chat template drops a reply in the role {role!r}, so the model "
                "would not see it. Reply in another role (Reply.role, and reply_roles of the "
                "task), or choose a tokenizer with another template."
            )
        first = [("user", _ASKED), ("assistant", "-"), (role, _REPLIED)]
        second = self._rendered([*first, ("assistant", _ANSWERED), (role, _REPLIED)])
        second = second.partition(_ANSWERED)[2]
        if second != increment:
            raise ValueError(
                f"The tokenizer's chat template puts {increment!r:.200} behind a first answer and "
                f"{second!r:.200} behind a second: what stands between two turns depends on their "
                "number, so replies cannot be appended. Choose a tokenizer with another template."
            )
        thought = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWERED}"
        whole = self._rendered([("user", _ASKED), ("assistant", thought), (role, _REPLIED)])
        self.extends &= whole.startswith(self._rendered([("user", _ASKED)]) + thought)

    def _check_limit(self, roles: Collection[str]) -> None:
        # A word, the sign that it was cut, and the mark at the end.
        least = 3 if self._small else 1 + max(len(self._ids(CUT, role, None)) for role in roles)
        if self._limit < least:
            raise ValueError(
                f"Got max_reply_tokens={self._limit}; with what the chat template puts around a "
                f"reply it must be at least {least}."
            )


def asked(
    task: Task, problem: Problem, turns: Sequence[Turn], address: Sequence[int]
) -> Reply | None:
    """What the task replies to the last of the turns.

    Args:
        task: Who is asked.
        problem: What it had asked.
        turns: All turns so far.
        address: Names the randomness of the episode: seed, row, sample, visit. The number of the
            turn, from 1, is added.

    Raises:
        TaskError: If the task fails, or returns what is no reply; with the row and the turn.
    """
    numbers = "|".join(str(int(number)) for number in (*address, len(turns)))
    try:
        reply = task.respond(problem, turns, Draws(f"reply|{numbers}".encode()))
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{at_turn(task, problem, len(turns))} failed: {named(error)}") from error
    if reply is not None and not isinstance(reply, Reply):
        raise TaskError(
            f"{at_turn(task, problem, len(turns))} returned {reply!r:.80} "
            f'({type(reply).__name__}); it must return a Reply, such as Reply("too low"), or None.'
        )
    return reply


def at_turn(task: Task, problem: Problem, turn: int) -> str:
    """Which call of `respond` it was, and where that is written."""
    return f"{described(task, 'respond')} on row {problem.row}, turn {turn},"


def grades_of_turns(
    task: Task,
    problems: Sequence[Problem],
    episodes: Sequence[Sequence[Turn]],
    truncated: Sequence[bool],
) -> list[Grade]:
    """The grades of a batch of episodes with turns; see `Task.grade_turns`.

    Where the last turn alone is graded, the batch goes to the task whole, and so to its workers.

    Raises:
        TaskError: If the task fails, or returns what is no grade.
    """
    if type(task).grade_turns is Task.grade_turns:
        return grades_of(task, problems, [turns[-1].completion for turns in episodes], truncated)
    grades = []
    for problem, turns, cut in zip(problems, episodes, truncated, strict=True):
        grade = ask(task, "grade_turns", problem, turns, truncated=cut)
        check_grade(task, "grade_turns", problem, grade)
        grades.append(grade)
    return grades


def transcript(turns: Sequence[Turn]) -> str:
    """Turns as a text to read: each completion, and below it who replied what."""
    lines = []
    for turn in turns:
        lines.append(turn.completion)
        if turn.reply is not None and turn.reply.text:
            lines.append(f"[{turn.reply.role}] {turn.reply.text}")
    return "\n".join(lines)


def takes_replies(task: Task, max_turns: int | None, *others: int | None) -> bool:
    """Whether a task is asked for replies.

    Args:
        task: Has more than one turn by default, or a method `respond` and gets them here.
        max_turns: The turns that it is given, None for its default.
        others: Further limits that nothing reads where there are no replies.

    Raises:
        ValueError: If there are no replies, and any of these settings would not be read.
    """
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"Got max_turns={max_turns}; it must be at least 1.")
    several = max_turns is not None and max_turns > 1
    if task.max_turns > 1 or (several and type(task).respond is not Task.respond):
        return True
    if several or any(limit is not None for limit in others):
        raise ValueError(no_replies(task, "max_turns, max_context_tokens or max_reply_tokens"))
    return False


def no_replies(task: Task, what: str) -> str:
    """Why something is refused that only a task with replies has."""
    return (
        f"Got {what}, but the task {task.name!r} has one turn: its episodes end with it. "
        "Leave that out, or give the task a method respond and max_turns."
    )


def context_limit(given: int | None, most: int, prompt: int, window: int | None) -> int:
    """Most tokens of an episode, prompt and replies included.

    Args:
        given: The setting; None: all that the other limits allow, within the window.
        most: What the other limits allow.
        prompt: Longest prompt allowed.
        window: What the model takes at most, where that is known.

    Raises:
        ValueError: If it exceeds the window, or leaves no room behind a prompt.
    """
    if given is None:
        return min(most, window or most)
    if window is not None and given > window:
        raise ValueError(
            f"Got max_context_tokens={given}, but the model's window has {window} tokens: lower it."
        )
    if given <= prompt:
        raise ValueError(
            f"Got max_context_tokens={given}, which leaves no room behind a prompt of "
            f"max_prompt_tokens={prompt}: raise it, or lower the latter."
        )
    return int(given)
