"""How fast and how right the graders are: `python -m benchmarks.graders`.

Prints one JSON object. Speeds are per CPU-second of one core: for integers this process alone, for
expressions this process and its one worker together. Programs are per second of the clock, one at
a time, each with three tests.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrl_envs.grading import CodeGrader, MathGrader
from distrl_envs.grading.worker_pool import WorkerPool, WorkerTimedOut
from distrl_envs.task import Grade
from tests.grading.mutations import mutation_pairs

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ALONE = Path(__file__).with_name("math_verify_alone.py")
"""A worker that asks math-verify and nothing else."""
REQUIRED_MODES = ("as_is", "wrap_in_box")
INTEGERS = 5_000
MUTATED = 7
"""Every so manieth gold of the benchmarks is mutated."""
STEP = 7
"""The answer to n is 7 n modulo 5,000, which is n for n = 0 and n = 2,500 alone."""
PROGRAMS = 60
REASONING = "Let us think step by step. " * 40


def integers_per_second(grader: MathGrader) -> tuple[float, list[Grade]]:
    """Completions with integer answers graded per CPU-second, and their grades."""
    golds = [str(n) for n in range(INTEGERS)]
    texts = [rf"{REASONING}\boxed{{{n * STEP % INTEGERS}}}" for n in range(INTEGERS)]
    started = time.process_time()
    grades = grader.grade_many(texts, golds)
    return INTEGERS / (time.process_time() - started), grades


def expressions_per_second() -> tuple[float, list[Grade]]:
    """Pairs of expressions compared per CPU-second, all different, and their grades."""
    surds = [(a, b) for a in range(2, 22) for b in range(2, 22) if a != b]
    golds = [rf"\frac{{{a}+\sqrt{{{b}}}}}{{3x}}" for a, b in surds]
    texts = [rf"\boxed{{\frac{{{a}}}{{3x}}+\frac{{\sqrt{{{b}}}}}{{3x}}}}" for a, b in surds]
    with MathGrader(workers=1) as grader:
        grader.grade(r"\boxed{\sin^2 x+\cos^2 x}", "1")
        pid = grader.pool.pids()[0]
        before = _cpu_seconds(pid) + time.process_time()
        grades = grader.grade_many(texts, golds)
        spent = _cpu_seconds(pid) + time.process_time() - before
    return len(surds) / spent, grades


def case_outcomes(grader: MathGrader, cases: list[dict]) -> list[tuple[dict, Grade, float]]:
    """Each labelled case with its grade and the seconds that it took."""
    sums = [rf"\sum x_{n}" for n in range(40)]
    grader.grade_many([rf"\boxed{{{text}}}" for text in sums], ["1"] * 40)  # All have started.
    outcomes = []
    for case in cases:
        boxed = case["mode"] == "wrap_in_box"
        text = rf"\boxed{{{case['prediction']}}}" if boxed else case["prediction"]
        started = time.monotonic()
        grade = grader.grade(text, case["gold"])
        outcomes.append((case, grade, time.monotonic() - started))
    return outcomes


def agrees(case: dict, grade: Grade) -> bool:
    """Whether a case is graded as it is labelled."""
    return (grade.score == 1.0) == case["expected"]


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def labelled_pairs(folder: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """(completion, gold, whether it is right) of each set of labelled cases."""

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    old = [case for case in lines("verifier_cases.jsonl") if case["mode"] in REQUIRED_MODES]
    boxed = [
        rf"\boxed{{{case['prediction']}}}" if case["mode"] == "wrap_in_box" else case["prediction"]
        for case in old
    ]
    new = [case for case in lines("grader_cases.jsonl") if case["id"].startswith("math-")]
    golds = [row["answer"] for path in sorted((folder / "benchmarks").glob("*.jsonl"))
             for row in lines(f"benchmarks/{path.name}")][::MUTATED]  # fmt: skip
    return {
        "other graders' cases": [
            (text, case["gold"], case["expected"]) for text, case in zip(boxed, old, strict=True)
        ],
        "failed cases": [
            (case["input"]["completion"], case["input"]["gold"], case["expected"] == "correct")
            for case in new
        ],
        "mutated golds": [
            (rf"\boxed{{{answer}}}", gold, what == "itself")
            for what, gold, answer in mutation_pairs(golds)
        ],
    }


def agreement(grader: MathGrader, pairs: list[tuple[str, str, bool]]) -> dict:
    """How many pairs are graded as labelled, and which way the others fail."""
    grades = grader.grade_many([text for text, *_ in pairs], [gold for _, gold, _ in pairs])
    marks = Counter(
        "as labelled" if (grade.score == 1.0) == right else "refused" if right else "accepted"
        for grade, (*_, right) in zip(grades, pairs, strict=True)
    )
    return {"pairs": len(pairs), **marks, "timeouts": sum(g.status == "timeout" for g in grades)}


class _Alone(MathGrader):
    """math-verify in the pool, without anything that this package reads or compares."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        arguments = [str(2_048 << 20), str(self.timeout + 2.0)]
        self.pool = WorkerPool(ALONE, arguments, self.workers, 2_000)

    def grade_many(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        return [self._alone(*pair) for pair in zip(completions, golds, strict=True)]

    def _alone(self, completion: str, gold: str) -> Grade:
        answer = self.extract(completion) or ""
        try:
            right = bool(self.pool.run((gold, answer), self.timeout))
        except WorkerTimedOut:
            return Grade(0.0, "timeout", answer)
        return Grade(float(right), "correct" if right else "wrong", answer)


def programs_per_second() -> float:
    """Programs graded per second, one at a time, by three assertions."""
    tests = ["assert f(2) == 4", "assert f(-1) == -2", "assert f(0) == 0"]
    with CodeGrader(workers=1) as grader:
        text = f"{REASONING}\n```python\ndef f(x):\n    return 2 * x\n```"
        grader.grade(text, tests)
        started = time.monotonic()
        grades = grader.grade_many([text] * PROGRAMS, [tests] * PROGRAMS, [None] * PROGRAMS)
        spent = time.monotonic() - started
    assert all(grade.status == "correct" for grade in grades)
    return PROGRAMS / spent


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, default=SHARED, help="folder of labelled cases")
    parser.add_argument("--alone", action="store_true", help="math-verify alone too, for minutes")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each speed")
    arguments = parser.parse_args()
    integers = [integers_per_second(MathGrader())[0] for _ in range(arguments.repeats)]
    expressions = [expressions_per_second()[0] for _ in range(arguments.repeats)]
    programs = [programs_per_second() for _ in range(arguments.repeats)]
    report: dict[str, Any] = {
        "integers_per_cpu_s": [round(speed) for speed in integers],
        "expressions_per_cpu_s": [round(speed) for speed in expressions],
        "programs_per_s": [round(speed, 1) for speed in programs],
        "cases": {},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    if arguments.cases.is_dir():
        for kind in (MathGrader, _Alone) if arguments.alone else (MathGrader,):
            with kind(timeout=3.0, workers=2) as grader:
                report["cases"][kind.__name__] = {
                    name: agreement(grader, pairs)
                    for name, pairs in labelled_pairs(arguments.cases).items()
                }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
