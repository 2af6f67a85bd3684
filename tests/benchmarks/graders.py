"""How fast and how right the math grader is: `python -m tests.benchmarks.graders`.

Prints one JSON object. Speeds are per CPU-second of one core: for integers this process alone, for
expressions this process and its one worker together.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

from distrl_envs.grading import MathGrader
from distrl_envs.task import Grade

SHARED_CASES = Path(__file__).resolve().parents[3] / "shared" / "data" / "verifier_cases.jsonl"
REQUIRED_MODES = ("as_is", "wrap_in_box")
INTEGERS = 5_000
STEP = 7
"""The answer to n is 7 n modulo 5,000, which is n for n = 0 and n = 2,500 alone."""
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


def _agreement(path: Path) -> dict:
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with MathGrader(timeout=3.0, workers=4) as grader:
        outcomes = case_outcomes(grader, cases)
    report = {}
    for mode in dict.fromkeys(case["mode"] for case in cases):
        marks = [agrees(case, grade) for case, grade, _ in outcomes if case["mode"] == mode]
        report[mode] = {"cases": len(marks), "agreement": round(sum(marks) / len(marks), 4)}
    disagreements = [
        case["id"]
        for case, grade, _ in outcomes
        if case["mode"] in REQUIRED_MODES and not agrees(case, grade)
    ]
    return {
        "modes": report,
        "disagreements": disagreements,
        "statuses": Counter(grade.status for _, grade, _ in outcomes),
        "slowest_case_s": round(max(seconds for *_, seconds in outcomes), 2),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, default=SHARED_CASES, help="labelled cases (JSONL)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each speed")
    arguments = parser.parse_args()
    integers = [integers_per_second(MathGrader())[0] for _ in range(arguments.repeats)]
    expressions = [expressions_per_second()[0] for _ in range(arguments.repeats)]
    report = {
        "integers_per_cpu_s": [round(speed) for speed in integers],
        "expressions_per_cpu_s": [round(speed) for speed in expressions],
        "cases": _agreement(arguments.cases) if arguments.cases.is_file() else None,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
