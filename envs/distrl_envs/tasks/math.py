"""Mathematics: a problem, a gold answer, an answer in a box."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from distrl_envs.data import Column
from distrl_envs.grading.extraction import extract_answer
from distrl_envs.grading.math_grader import MathGrader, compile_pattern, gold_form
from distrl_envs.grading.normal_form import normalise
from distrl_envs.grading.plain_numbers import canonical, quick_verdict
from distrl_envs.task import Grade, Problem
from distrl_envs.tasks.data_task import PROBLEM, DataTask

ANSWERS = (str, int, float)
INSTRUCTION = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

MOST_WORDS = 4
"""So many words outside of formulas make a gold prose, if it looks like a sentence too."""
_PLACEHOLDERS = ("nan", "<na>", "n/a", "null", "proof", "see solution", "todo")
_LIST = re.compile(r"\s*\[\s*['\"]")
_ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*", re.DOTALL
)
_WORDS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}(?![A-Za-z])")
_SENTENCE = re.compile(r"[a-z)$}][.!?](\s+[A-Z]|$)")


class MathTask(DataTask):
    r"""Problems whose answer is a mathematical object.

    Each row has a `problem` and an `answer`, or a list of answers of which any is right. The answer
    of a completion is its last balanced `\boxed{}`, or what `answer_pattern` matches last. Grading
    never raises on a completion; see `MathGrader`. Tasks with the same grader settings share one
    pool of workers per process.
    """

    name = "math"

    def __init__(
        self,
        data: str | Path | Mapping[str, str],
        *,
        gold_pattern: str | None = None,
        answer_pattern: str | None = None,
        instruction: str | None = None,
        system_prompt: str | None = None,
        timeout: float = 3.0,
        workers: int | None = None,
        ignore_unfinished_thinking: bool = True,
        **common: Any,
    ):
        r"""Loads the problems.

        Args:
            data: A file or `hf:name/split`, or one for each split; see `DataTask`.
            gold_pattern: Regular expression whose group is the answer, where the data's field
                holds more than that.
            answer_pattern: Regular expression whose group holds the answer of a completion, in
                place of the box; needs an `instruction` that asks for that form.
            instruction: Prompt around `{problem}`.
            system_prompt: System message.
            timeout: Seconds for one comparison in a worker.
            workers: Worker processes; by default half the cores.
            ignore_unfinished_thinking: Whether what follows a `<think>` that is never closed is no
                answer.
            **common: What every task over data takes; see `DataTask`.

        Raises:
            ValueError: If the data has faults, a pattern is no regular expression, or the prompt
                does not ask for the form that is graded.
        """
        compile_pattern(answer_pattern)
        own_instruction = instruction
        instruction = _instruction(instruction, system_prompt, answer_pattern)
        gold = compile_pattern(gold_pattern)
        columns = {
            "problem": PROBLEM,
            "answer": Column((*ANSWERS, list), convert=lambda value: _golds(value, gold)),
        }
        super().__init__(
            data,
            columns,
            instruction=instruction,
            gold="answer",
            gold_key=lambda answers: {canonical(gold_form(answer)) for answer in answers},
            system_prompt=system_prompt,
            **common,
        )
        self.asks_as_published = own_instruction is None and answer_pattern is None
        self._grader = (timeout, workers, answer_pattern, ignore_unfinished_thinking)

    @property
    def grader(self) -> MathGrader:
        """The grader that this process shares among tasks with the same settings."""
        return shared_grader(*self._grader)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """1.0 for a right answer; `too_long` where a cut-off completion has none."""
        return self.grade_many([problem], [completion], [truncated])[0]

    def grade_many(
        self, problems: Sequence[Problem], completions: Sequence[str], truncated: Sequence[bool]
    ) -> list[Grade]:
        """Grades a batch, all workers at once."""
        pairs = [
            (completion, gold)
            for problem, completion in zip(problems, completions, strict=True)
            for gold in problem.data["answer"]
        ]
        graded = iter(self.grader.grade_many(*zip(*pairs, strict=True)) if pairs else ())
        best = [max(islice(graded, len(p.data["answer"])), key=_telling) for p in problems]
        return [
            replace(grade, status="too_long") if cut and grade.status == "no_answer" else grade
            for grade, cut in zip(best, truncated, strict=True)
        ]

    def critic_text(self, problem: Problem) -> str:
        """The gold answer, or several where each is right."""
        return f"Reference answer: {' or '.join(problem.data['answer'])}\n\n"

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers are the same mathematical object."""
        return self.grader.same_answer(one, other)


@lru_cache(maxsize=16)
def shared_grader(
    timeout: float,
    workers: int | None,
    answer_pattern: str | None,
    ignore_unfinished_thinking: bool,
) -> MathGrader:
    """One grader per process and settings: environments come in dozens, workers should not."""
    return MathGrader(
        timeout=timeout,
        workers=workers,
        answer_pattern=answer_pattern,
        ignore_unfinished_thinking=ignore_unfinished_thinking,
    )


def _instruction(
    instruction: str | None, system_prompt: str | None, answer_pattern: str | None
) -> str:
    asked = (instruction or "") + (system_prompt or "")
    if answer_pattern is not None and not asked:
        raise ValueError(
            f"Got answer_pattern={answer_pattern!r} without an instruction: the default one asks "
            "for a box. Give the instruction that asks for the form of this pattern."
        )
    if answer_pattern is None and instruction is not None and "boxed" not in asked:
        raise ValueError(
            f"Got the instruction {instruction!r}, which does not ask for \\boxed{{}}, where the "
            "answer is looked for: ask for it, or give the answer_pattern of what is asked."
        )
    return INSTRUCTION if instruction is None else instruction


def _telling(grade: Grade) -> tuple[bool, bool]:
    """Of the grades for several golds the best counts, then one that is undecided."""
    return grade.status == "correct", grade.status in ("timeout", "worker_died")


def _golds(value: Any, pattern: Any) -> tuple[str, ...]:
    if isinstance(value, str) and _LIST.match(value):
        value = _listed(value)
    return tuple(_gold(one, pattern) for one in (value if isinstance(value, list) else [value]))


def _listed(text: str) -> list[Any]:
    """A list of texts that was written as text, as CSV files hold it."""
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list) or not found:
        raise ValueError(f"holds {text!r:.60}, a list as text that cannot be read")
    return found


def _gold(value: Any, pattern: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, ANSWERS):
        raise ValueError(f"lists {type(value).__name__} {value!r:.60}; it must list str or numbers")
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"holds {value}, which is no answer")
    text = str(value)
    if pattern is not None:
        matches = list(pattern.finditer(text))
        if not matches:
            raise ValueError(f"holds {text!r:.60}, which gold_pattern does not match")
        text = next((g for g in matches[-1].groups() if g is not None), matches[-1].group())
    check_gold(text)
    return text


@lru_cache(maxsize=65_536)
def check_gold(text: str) -> None:
    r"""Refuses a gold that no answer can equal.

    It must hold an answer, be no placeholder and no prose, and be right itself when it stands in a
    box. Prose (our choice) is text of more than one line, or four words or more outside of formulas
    that begin with a word, end a sentence or have no formula beside them.

    Raises:
        ValueError: With the reason and, where one is known, what reads such data.
    """
    form = gold_form(text)  # Raises where the gold holds no answer.
    bare = (extract_answer(text) if "\\boxed" in text else None) or text
    if bare.strip().lower() in _PLACEHOLDERS:
        raise ValueError(f"holds {text!r:.60}, which stands for a missing answer")
    if _is_prose(bare):
        raise ValueError(
            f"holds {text!r:.60}, which is text and no answer that another could equal; "
            + _remedy(bare)
        )
    found = extract_answer(f"\\boxed{{{bare}}}")
    own = normalise(found) if found else ""
    if own != form and not quick_verdict(form, own or " "):
        raise ValueError(f"holds {text!r:.60}, which is not right itself in \\boxed{{}}")


def _is_prose(text: str) -> bool:
    lines = [line for line in _ENVIRONMENT.sub("", text).strip().splitlines() if line.strip()]
    plain = _FORMULA.sub(" ", text)
    words = _WORDS.findall(plain)
    if len(lines) > 1:
        return len(words) >= MOST_WORDS or "####" in text
    sentence = _SENTENCE.search(text.strip()) is not None
    starts = re.match(r"[A-Za-z]{2,}\s", text.strip()) is not None
    return len(words) >= MOST_WORDS and (sentence or starts or plain.strip() == text.strip())


def _remedy(text: str) -> str:
    if "####" in text:
        return "set format = 'gsm8k', or gold_pattern = '####\\s*(.+?)\\s*$'"
    return (
        "map the field that holds the result alone, or set a gold_pattern that finds it; "
        "format = 'math' reads solutions that end in a \\boxed{}"
    )
