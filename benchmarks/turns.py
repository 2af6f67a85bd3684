"""What turns cost: an engine that keeps the past, one that computes it again, and a slow tool.

    python -m benchmarks.turns    # a random model of the small benchmark's size, one thread

64 rows sample 64 tokens each: in one turn; in four of 16 tokens with replies of 8 tokens between
them, the past kept; the same with the past computed again at each turn. Then 2,048 rows, 64 at a
time, where a tenth of the replies take 200 ms, and where none does. Rounds are interleaved; printed
are medians over rounds of the ratio of two times of the same round.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rllib_distrl.engine import Request, SamplingParams, TorchEngine
from rllib_distrl.engine.conversation import Answer, converse
from rllib_distrl.rollout.turns import SLOW_REPLIES

ROWS, QUEUE, TURNS, TURN, REPLY, PROMPT = 64, 2048, 4, 16, 8, 16
SLOW_SHARE, SLOW_S = 0.1, 0.2
ROUNDS = 9
TOKENS = TURNS * TURN


class Partner:
    """Replies after every 16 sampled tokens, at once or from a thread that sleeps now and then."""

    longest = PROMPT + TOKENS + TURNS * REPLY
    stops: Callable[[int, np.ndarray], bool] | None = None

    def __init__(self, *, slow: bool = False):
        self.rng = np.random.default_rng(0)
        self.pool = ThreadPoolExecutor(SLOW_REPLIES) if slow else None
        self.coming: list[Future[Answer]] = []
        self.there: list[Answer] = []

    def ended(self, place: int, tokens: np.ndarray) -> bool:
        if len(tokens) >= TOKENS:
            return False
        answer = Answer(place, range(10, 10 + REPLY), len(tokens) + TURN)
        if self.pool is None:
            self.there.append(answer)
        else:
            sleeps = SLOW_S * (self.rng.random() < SLOW_SHARE)
            self.coming.append(self.pool.submit(_after, sleeps, answer))
        return True

    def ready(self, *, wait: bool) -> Sequence[Answer]:
        while True:
            done = [future for future in self.coming if future.done()]
            self.coming = [future for future in self.coming if future not in done]
            now = self.there + [future.result() for future in done]
            self.there = []
            if now or not wait:
                return now
            time.sleep(0.0002)


def _after(seconds: float, answer: Answer) -> Answer:
    time.sleep(seconds)
    return answer


class Again:
    """An engine that keeps nothing of a row that waits."""

    def __init__(self, engine: TorchEngine):
        self.version, self.generate = engine.version, engine.generate


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Prints one line for each comparison."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    engine = TorchEngine(config, [], max_batch_size=ROWS)
    engine.load_weights(AutoModelForCausalLM.from_config(config).state_dict(), 0)
    params = SamplingParams(TOKENS)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 128, PROMPT).tolist() for _ in range(QUEUE)]
    first = [Request(prompt, (0, row, 0, 0), limit=TURN) for row, prompt in enumerate(prompts)]
    whole = [replace(request, limit=None) for request in first[:ROWS]]

    def talk(other: Any, requests: Sequence[Request], *, slow: bool = False) -> None:
        found = dict(converse(other, requests, params, Partner(slow=slow)))
        assert {len(completion.tokens) for completion in found.values()} == {TOKENS}

    ways: dict[str, Callable[[], object]] = {
        "one turn": lambda: engine.generate(whole, params),
        "four turns, past kept": lambda: talk(engine, first[:ROWS]),
        "four turns, computed again": lambda: talk(Again(engine), first[:ROWS]),
        "a queue, fast replies": lambda: talk(engine, first),
        "a queue, slow replies": lambda: talk(engine, first, slow=True),
    }
    for work in ways.values():
        work()
    taken = {name: np.zeros(ROUNDS) for name in ways}
    for number in range(ROUNDS):
        for name, work in ways.items():
            taken[name][number] = seconds(work)
    for name, base in (
        ("four turns, past kept", "one turn"),
        ("four turns, computed again", "one turn"),
        ("a queue, slow replies", "a queue, fast replies"),
    ):
        ratios = taken[name] / taken[base]
        print(
            f"{name}: {np.median(taken[name]):.3f} s, {np.median(ratios):.2f} times {base} "
            f"({ratios.min():.2f} to {ratios.max():.2f} in {ROUNDS} rounds)"
        )


if __name__ == "__main__":
    main()
