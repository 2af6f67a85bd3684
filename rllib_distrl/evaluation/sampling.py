"""From problems to graded samples: rows through an engine, finished problems out."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

from distrl_envs.task import Grade, Problem, Reply, grades_of
from distrl_envs.tokenizers import decode_completion
from distrl_envs.turns import EnvReply
from rllib_distrl.engine.protocol import Completion, Request, RolloutEngine, SamplingParams
from rllib_distrl.rollout.turns import sample_episodes
from rllib_distrl.settings import EvalSettings

MOST_TOKENS = 1 << 22
"""Tokens of the completions that are asked for at a time: some hundred megabytes with the texts and
Python's overhead."""
# Finished problems are written at the latest after so long, whatever a part should hold.
_LONGEST_S = 60.0


@dataclass(frozen=True)
class Progress:
    """How far an evaluation has come; passed to ``on_progress`` whenever a sample has ended.

    Attributes:
        problems_done: Problems whose samples are graded, those of an earlier run included.
        problems: Problems in all.
        resumed: Problems that an earlier run had finished.
        samples: Samples that have ended in this run.
        tokens: Their tokens.
        seconds: Time that this run took for them.
        score: Mean score of those that are graded, 0 before the first.
        n: Samples per problem.
    """

    problems_done: int
    problems: int
    resumed: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    score: float = 0.0
    n: int = 1

    @property
    def samples_done(self) -> int:
        """Samples that have ended, those of an earlier run included."""
        return self.resumed * self.n + self.samples

    @property
    def samples_in_all(self) -> int:
        """Samples of all problems."""
        return self.problems * self.n

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the end; None before the first sample of this run."""
        left = self.samples_in_all - self.samples_done
        return self.seconds / self.samples * left if self.samples else None


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Prompted:
    """A problem with its place in the evaluation and its prompt as tokens."""

    position: int
    problem: Problem
    prompt_ids: Sequence[int]


class _Tally:
    """Counts samples and says so."""

    def __init__(self, start: Progress, report: ProgressCallback | None):
        self._report = report or (lambda progress: None)
        self._now, self._score, self._graded = start, 0.0, 0
        self._started = time.perf_counter()
        self._report(start)

    def ended(self, tokens: int) -> None:
        """One sample more."""
        now = self._now
        self._say(replace(now, samples=now.samples + 1, tokens=now.tokens + tokens))

    def graded(self, problems: int, scores: Sequence[float]) -> None:
        """So many problems more, with the scores of their samples."""
        self._score, self._graded = self._score + sum(scores), self._graded + len(scores)
        done = self._now.problems_done + problems
        self._say(replace(self._now, problems_done=done, score=self._score / self._graded))

    def _say(self, progress: Progress) -> None:
        self._now = replace(progress, seconds=time.perf_counter() - self._started)
        self._report(self._now)


class Sampler:
    """Samples problems with an engine and grades the samples.

    Args:
        prompted: The problems.
        settings: How to sample.
        params: The engine's part of them.
        engine: Has the model's weights.
        env: The `TokenEnv`: its task grades, and replies where it has turns.
        eos: Tokens that end a completion.
    """

    def __init__(
        self,
        prompted: Sequence[Prompted],
        settings: EvalSettings,
        params: SamplingParams,
        engine: RolloutEngine,
        env: Any,
        eos: Collection[int],
    ):
        self.prompted, self.settings, self.params, self.engine = prompted, settings, params, engine
        self.env, self.task, self.eos = env, env.task, eos

    def changed(self, finished: Mapping[int, str]) -> str:
        """Says where finished problems are not those of the data any more; "" if they all are."""
        for prompted in self.prompted:
            key, now = finished.get(prompted.position), prompted.problem.key
            if key not in (None, now):
                return f"problem {prompted.position} was {key!r} and is {now!r}"
        return ""

    def is_stale(self, position: int, grading: str | None) -> bool:
        """Whether a stored grade is one of another gold or grader."""
        return position < len(self.prompted) and grading != self._gradings[position]

    def grade_anew(self, records: list[dict[str, Any]]) -> int:
        """Grades stored samples again whose gold or grader is another now; how many they were.

        The records are changed in place.
        """
        stale = [r for r in records if self.is_stale(r["problem"], r["grading"])]
        if self.env.has_turns:
            rows = [record["row"] for record in stale]
            replies = [replies_of(record) for record in stale]
            tokens = [record["token_ids"] for record in stale]
            grades = [grade for _, grade in self.env.grade_many(rows, tokens, replies)]
        else:
            grades = grades_of(
                self.task,
                [self.prompted[record["problem"]].problem for record in stale],
                [record["completion"] for record in stale],
                [record["finish_reason"] == "length" for record in stale],
            )
        for record, grade in zip(stale, grades, strict=True):
            record |= _graded(grade, self._gradings[record["problem"]])
        return len(stale)

    @cached_property
    def _gradings(self) -> list[str]:
        """What identifies the grading of each problem."""
        return [self.task.grading_key(prompted.problem) for prompted in self.prompted]

    def parts(
        self, finished: Collection[int], on_progress: ProgressCallback | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields graded samples of whole problems, in the problems' order, as they are finished.

        The engine is asked for as many rows at a time as fit into memory, so that it always decodes
        as many as it takes. Where ``on_progress`` raises KeyboardInterrupt, the problems that are
        finished are yielded before that goes on.
        """
        n, total = self.settings.n, len(self.prompted)
        todo = [p for p in self.prompted if p.position not in finished]
        resumed = total - len(todo)
        tally = _Tally(Progress(resumed, total, resumed, n=n), on_progress)
        size = max(1, MOST_TOKENS // (n * self.params.max_tokens))
        for start in range(0, len(todo), size):
            yield from self._parts(todo[start : start + size], tally)

    def _parts(self, problems: Sequence[Prompted], tally: _Tally) -> Iterator[list[dict[str, Any]]]:
        n, size = self.settings.n, self.settings.problems_per_part
        ended: dict[int, Completion] = {}
        missing = [n] * len(problems)
        first = ready = 0  # problems before the first are yielded, before ready they are finished
        since = time.monotonic()

        def part() -> list[dict[str, Any]]:
            samples = [ended.pop(place) for place in range(first * n, ready * n)]
            return self._grade(problems[first:ready], samples)

        try:
            for place, completion in self._ended(problems):
                ended[place] = completion
                missing[place // n] -= 1
                while ready < len(problems) and not missing[ready]:
                    ready += 1
                tally.ended(len(completion.tokens))
                late = ready > first and time.monotonic() - since > _LONGEST_S
                if ready - first >= size or late or ready == len(problems):
                    yield (records := part())
                    count, first, since = ready - first, ready, time.monotonic()
                    tally.graded(count, [record["score"] for record in records])
        except KeyboardInterrupt:
            if ready > first:
                yield part()
            raise

    def _ended(self, problems: Sequence[Prompted]) -> Iterable[tuple[int, Completion]]:
        """Each sample's place, problem by problem, and completion: as they end, if engines can."""
        requests = [
            Request(p.prompt_ids, (self.settings.seed or 0, p.problem.row, sample, 0))
            for p in problems
            for sample in range(self.settings.n)
        ]
        return sample_episodes(self.engine, requests, self.params, self.env)

    def _grade(
        self, problems: Sequence[Prompted], completions: Sequence[Completion]
    ) -> list[dict[str, Any]]:
        """The records of all samples of some problems."""
        jobs = [(prompted, sample) for prompted in problems for sample in range(self.settings.n)]
        if self.env.has_turns:
            rows = [prompted.problem.row for prompted, _ in jobs]
            tokens, replies = zip(
                *((c.tokens.tolist(), c.replies) for c in completions), strict=True
            )
            texts, grades = zip(*self.env.grade_many(rows, tokens, replies), strict=True)
        else:
            texts = [
                decode_completion(self.env.tokenizer, c.tokens.tolist(), self.eos)
                for c in completions
            ]
            truncated = [c.finish_reason == "length" for c in completions]
            grades = grades_of(self.task, [p.problem for p, _ in jobs], texts, truncated)
        return [
            _record(*job, completion, text)
            | self._replied(completion)
            | _graded(grade, self._gradings[job[0].position])
            for job, completion, text, grade in zip(jobs, completions, texts, grades, strict=True)
        ]

    def _replied(self, completion: Completion) -> dict[str, Any]:
        """The columns of `result.SCHEMA` that an environment decides which replies."""
        if not self.env.has_turns:
            return {"replies": None}
        reason = self.env.finish_reason(completion.tokens.tolist(), completion.replies)
        return {"replies": _stored(completion), "finish_reason": reason}


def _stored(completion: Completion) -> list[dict[str, Any]]:
    """The column `replies` of `result.SCHEMA`."""
    return [
        {"at": r.at, "ids": list(r.ids), **asdict(r.reply), "finish": r.finish}
        for r in completion.replies
    ]


def replies_of(record: Mapping[str, Any]) -> list[EnvReply]:
    """The inverse of `_stored`."""
    return [
        EnvReply(
            stored["at"],
            tuple(stored["ids"]),
            Reply(**{name: stored[name] for name in ("text", "role", "reward", "over", "status")}),
            stored["finish"],
        )
        for stored in record["replies"] or ()
    ]


def _graded(grade: Grade, grading: str) -> dict[str, Any]:
    """The columns of `result.SCHEMA` that a grade decides."""
    return {
        "status": grade.status,
        "score": float(grade.score),
        "answer": grade.answer,
        "grading": grading,
    }


def _record(prompted: Prompted, sample: int, completion: Completion, text: str) -> dict[str, Any]:
    """One row of `result.SCHEMA`, its grade aside."""
    collapsed = " ".join(text.split())
    return {
        "problem": prompted.position,
        "row": prompted.problem.row,
        "key": prompted.problem.key,
        "sample": sample,
        "prompt": prompted.problem.prompt,
        "completion": text,
        "token_ids": completion.tokens.tolist(),
        "text_hash": blake2b(collapsed.encode(), digest_size=8).hexdigest(),
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logp_sum": float(completion.logps.sum(dtype="float64")),
    }
