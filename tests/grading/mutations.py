"""Wrong answers made from right ones: `python -m tests.grading.mutations` shows every exception.

Each gold of the benchmarks must grade itself right, and what is made from it wrong.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from distrl_envs.grading import MathGrader

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
DISTANCE = 7
"""How many rows further the other row is whose gold is tried."""


def mutations(gold: str, other: str) -> dict[str, str]:
    """Answers that differ from a gold, by what was done to it."""
    bare = gold.replace("$", " ").strip().rstrip(".")
    whole = re.fullmatch(r"-?\d+", bare)
    made = {
        "plus one": str(int(bare) + 1) if whole else f"({bare})+1",
        "negated": str(-int(bare)) if whole else f"-({bare})",
        "times ten": str(10 * int(bare)) if whole else f"10({bare})",
        "million": f"{bare} million",
        "million in text": rf"{bare} \text{{ million}}",
    }
    if re.search(r"(?<![\d.])0$", bare):
        made = {"plus one": made["plus one"]}  # Nothing else changes a nought.
    swapped = re.sub(r"(\d)(?!\1)(\d)(?!\d)", r"\2\1", bare, count=1)
    if swapped != bare:
        made["swapped digits"] = swapped
    if other.strip("$") not in bare:  # As 1 is said by k = 1.
        made["another row"] = other
    return made


def mutation_pairs(golds: list[str]) -> list[tuple[str, str, str]]:
    """(what was done, gold, answer) for all golds; "itself" must be right, all else wrong."""
    pairs = []
    for index, gold in enumerate(golds):
        pairs.append(("itself", gold, gold))
        other = golds[(index + DISTANCE) % len(golds)]
        pairs += [(what, gold, answer) for what, answer in mutations(gold, other).items()]
    return pairs


def exceptions(grader: MathGrader, pairs: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The pairs that are graded otherwise than they should be."""
    grades = grader.grade_many([rf"\boxed{{{answer}}}" for *_, answer in pairs],
                               [gold for _, gold, _ in pairs])  # fmt: skip
    return [
        pair for pair, grade in zip(pairs, grades, strict=True)
        if (grade.status != "correct") == (pair[0] == "itself")
    ]  # fmt: skip


def main() -> None:
    """Grades all mutations of all files and prints the exceptions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=BENCHMARKS, help="folder of *.jsonl")
    files = sorted(parser.parse_args().data.glob("*.jsonl"))
    with MathGrader(workers=2) as grader:
        for path in files:
            golds = [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]
            pairs = mutation_pairs(golds)
            found = exceptions(grader, pairs)
            share = 1 - len(found) / len(pairs)
            print(f"{path.stem}: {share:.3%} of {len(pairs)}", dict(Counter(p[0] for p in found)))
            for what, gold, answer in found:
                print(f"    {what}: {gold!r} = {answer!r}")


if __name__ == "__main__":
    main()
