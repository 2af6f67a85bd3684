"""What turns cost, from prompts to graded episodes, and what a slow tool costs.

    python -m benchmarks.turns [--rounds 5] [--dry]

The small workload's model; 64 rows sample 64 tokens each: in one turn; in four of 16 tokens, with
replies of two tokens between them, and of eight. Then 2,048 rows, 64 at a time, in four turns of a
task that replies in a pool of threads: every reply comes at once, or a tenth of them take 200 ms.
Rounds are interleaved; a ratio is that of two runs of the same round, by CPU seconds for turns and
by the wall clock for slow replies. Writes benchmarks/results/turns.json and renews the table of
docs/performance.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from benchmarks.run import RESULTS, ROOT, about, keep
from benchmarks.task import WordTask
from benchmarks.workload import (
    GENERATIONS,
    PROMPT_TOKENS,
    PROMPTS,
    WORDS,
    Stopwatch,
    make_model,
)
from distrl_envs import Draws, Grade, Problem, Reply, TokenEnv, Turn
from rllib_distrl import DistRLConfig
from rllib_distrl.experiments.pages import Table
from rllib_distrl.method.prompt_samplers import PromptRequest
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner

ROWS, QUEUE, TURNS, TURN = PROMPTS * GENERATIONS, 2048, 4, 16
SHORT, LONG = 2, 8
SLOW_ONE_IN, SLOW_S = 10, 0.2
COMPUTED = PROMPT_TOKENS / GENERATIONS + TURNS * TURN - 1
"""Tokens of a row in one turn that the model computes: prompts are shared, the last is drawn."""
OUT, PAGE = RESULTS.with_name("turns.json"), ROOT / "docs" / "performance.md"
VISITS = count()


class TalkTask(WordTask):
    """The workload's prompts; every turn is answered by some words, late for a share of them."""

    max_turns, max_reply_tokens = TURNS, LONG

    def __init__(self, words: int, pool: bool = False, late: bool = False):
        super().__init__()
        self.words, self.replies_slowly, self.late = words, pool, late

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply:
        if self.late and draws.below(SLOW_ONE_IN) == 0:
            time.sleep(SLOW_S)
        return Reply(" ".join(WORDS[10 : 10 + self.words]))

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        return self.grade(problem, " ".join(turn.completion for turn in turns))


class FixedTurns(TokenEnv):
    """Turns end after 16 tokens: the workload's model says no EOS."""

    def ends_turn(self, completion: Sequence[int], start: int = 0) -> bool:
        return len(completion) - start >= TURN

    def room(self, prompt_length: int, completion: Any, replies: Any = ()) -> int:
        return min(TURN, super().room(prompt_length, completion, replies))


ENV = "benchmarks/FixedTurns-v0"
if ENV not in gymnasium.registry:
    gymnasium.register(
        ENV, "benchmarks.turns:FixedTurns", disable_env_checker=True, order_enforce=False
    )


def make_runner(model: Path, **talk: Any) -> CompletionEnvRunner:
    """A runner on the workload in one turn, or in four of a `TalkTask` of these settings."""
    config = DistRLConfig()
    if not talk:
        config.environment(
            "distrl_envs:distrl/Custom-v0", env_config={"task": "benchmarks.task:WordTask"}
        )
    else:
        task = {"task": "benchmarks.turns:TalkTask", "task_config": talk}
        config.environment(f"benchmarks.turns:{ENV}", env_config=task)
    config.rl_module(model_config={"model": str(model)})
    config.rollout(
        prompts_per_iteration=PROMPTS,
        num_generations=GENERATIONS,
        max_completion_tokens=TURNS * TURN,
        max_batch_size=ROWS,
    )
    config.env_runners(num_env_runners=0)
    config.debugging(seed=0, log_level="ERROR")
    config.validate()
    return CompletionEnvRunner(config=config)


def sampled(runner: CompletionEnvRunner, rows: int, turns: int) -> dict[str, float]:
    """Seconds of so many rows, from prompts to episodes."""
    visit, watch = next(VISITS), Stopwatch()
    prompts = [PromptRequest(row, visit) for row in range(PROMPTS)]
    with watch.running():
        report = runner.sample_prompts(prompts, rows // PROMPTS)
    assert report.error is None, report.error.text
    lengths = {len(episode) for episode in report.episodes}
    said = {len(episode.infos[0].get("replies", ())) for episode in report.episodes}
    assert lengths == {TURNS * TURN} and said == {turns - 1}, (lengths, said)
    return watch.measured(rows * TURNS * TURN)


def prefilled(runner: CompletionEnvRunner) -> float:
    """Tokens that the decoder computes at once when a row takes its next turn, on average."""
    given, decoder = [], runner.engine.decoder
    resume = decoder.resume

    def counted(parked: Sequence[Any], more: Sequence[Sequence[int]]) -> Any:
        given.extend(map(len, more))
        return resume(parked, more)

    decoder.resume = counted
    try:
        sampled(runner, ROWS, TURNS)
    finally:
        del decoder.resume
    assert len(given) == ROWS * (TURNS - 1)
    return float(np.mean(given))


def more(reply: int) -> float:
    """How many times as many tokens are computed in four turns, with replies of so many."""
    return 1 + (TURNS - 1) * reply / COMPUTED


def measure(rounds: int) -> dict[str, Any]:
    """Ratios of all rounds, and the tokens of a turn."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), "fixed")
        one, short, long = (
            make_runner(model),
            make_runner(model, words=SHORT),
            make_runner(model, words=LONG),
        )
        prompt, late = (
            make_runner(model, words=LONG, pool=True, late=late) for late in (False, True)
        )
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "one turn": lambda: sampled(one, ROWS, 1),
            "four turns, short replies": lambda: sampled(short, ROWS, TURNS),
            "four turns, long replies": lambda: sampled(long, ROWS, TURNS),
            "queue": lambda: sampled(long, QUEUE, TURNS),
            "queue, pool": lambda: sampled(prompt, QUEUE, TURNS),
            "queue, pool, slow replies": lambda: sampled(late, QUEUE, TURNS),
        }
        tokens = prefilled(long)
        for work in ways.values():
            work()
        found = [{name: work() for name, work in ways.items()} for _ in range(rounds)]

    def ratio(name: str, base: str, clock: str) -> dict[str, Any]:
        ratios = [one[name][clock] / one[base][clock] for one in found]
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        return {"median": median, "low": low, "high": high, "ratios": ratios, "clock": clock}

    return {
        **about(),
        "four_turns_vs_one": ratio("four turns, short replies", "one turn", "cpu_s"),
        "four_turns_vs_one_long_replies": ratio("four turns, long replies", "one turn", "cpu_s"),
        "slow_replies_vs_fast": ratio("queue, pool, slow replies", "queue, pool", "wall_s"),
        "pool_vs_none": ratio("queue, pool", "queue", "wall_s"),
        "prefilled_tokens_a_turn": tokens,
        "seconds": found,
    }


def table(results: dict[str, Any]) -> str:
    """As it stands in docs/performance.md."""
    lines: list[list[str]] = []
    long, most = "four_turns_vs_one_long_replies", 1.15
    for name, key, share, aim, what in (
        ("four_turns_vs_one", "four_turns_vs_one", 1.0, most, f"replies of {SHORT} tokens"),
        (long, long, 1.0, None, f"replies of {LONG}: {more(LONG):.2f} times the tokens"),
        ("the same a token", long, more(LONG), most, "computed, sampled or not"),
        ("slow_replies_vs_fast", "slow_replies_vs_fast", 1.0, 1.1, "a tenth take 200 ms"),
        ("pool_vs_none", "pool_vs_none", 1.0, None, "fast replies in threads, or between steps"),
    ):
        low, median, high = (results[key][of] / share for of in ("low", "median", "high"))
        missed = "" if aim is None or median <= aim else " (missed)"
        quartiles = f"{low:.2f} to {high:.2f}"
        aimed = "" if aim is None else f"≤ {aim}{missed}"
        lines.append([f"`{name}`", f"{median:.2f}", quartiles, aimed, what])
    tokens = results["prefilled_tokens_a_turn"]
    what = f"tokens computed for a turn: a reply of {LONG} and the turn's last token"
    lines.append(["`prefilled_tokens_a_turn`", f"{tokens:g}", "", f"{LONG + 1}", what])
    return Table(["cost", "median", "quartiles", "aim", "what"], lines).to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="do not write the results")
    chosen = parser.parse_args()
    results = measure(chosen.rounds)
    print(table(results))
    if not chosen.dry:
        keep(results, table(results), OUT, PAGE, "turns")


if __name__ == "__main__":
    main()
