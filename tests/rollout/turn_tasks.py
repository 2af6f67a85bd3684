"""Tasks that reply, for models that know the small tokenizer."""

import time
from dataclasses import replace

from distrl_envs.task import Grade, Problem, Reply, Task
from distrl_envs.tokenizers import VOCABULARY, small_tokenizer


class Talk(Task):
    """Whatever is said, the reply is a number of 0 to 9, as many words as the turn's number.

    A turn is worth a quarter; the score is the share of numbers in what was said.
    """

    name = "talk"
    max_turns = 3
    max_prompt_tokens = 12
    max_completion_tokens = 40
    max_reply_tokens = 8

    def __init__(self, split="train", seed=0):
        self.split = split

    def __len__(self):
        return 1000

    def problem(self, row):
        self.check_row(row)
        prompt = f"{1 + row % 9} {1 + row % 7} {1 + row % 5} {1 + row % 8} -> 24 :"
        return Problem(row, prompt, {}, str(row))

    def respond(self, problem, turns, draws):
        words = [str(draws.below(10)) for _ in turns]
        return Reply(" ".join(words), reward=0.25)

    def grade(self, problem, completion, *, truncated=False):
        raise AssertionError("an episode of turns is graded as one")

    def grade_turns(self, problem, turns, *, truncated):
        words = [word for turn in turns for word in turn.completion.split()]
        share = sum(word.isdigit() for word in words) / max(1, len(words))
        return Grade(share, "too_long" if truncated else "ok")

    def tokenizer(self):
        return small_tokenizer()


class ShortTalk(Talk):
    """The same, but a second turn is the last where its reply begins with an odd number.

    With 1, 3 and 5 the reply says so, with 7 and 9 there is none.
    """

    name = "short_talk"

    def respond(self, problem, turns, draws):
        reply = super().respond(problem, turns, draws)
        first = int(reply.text[0])
        if len(turns) < 2 or first % 2 == 0:
            return reply
        return replace(reply, over=True) if first < 6 else None


class SlowTalk(Talk):
    """The same, after a while that depends on the row."""

    name = "slow_talk"
    replies_slowly = True

    def respond(self, problem, turns, draws):
        time.sleep(0.01 * (problem.row % 3))
        return super().respond(problem, turns, draws)


class Reroll(Talk):
    """A die that may be rolled again, once: an odd number keeps it, whatever else rolls anew.

    The first turn's word is of no use; its reply is the first roll. The score is the last roll, of
    six. Who keeps 4, 5 and 6 alone gets 17/24, nobody gets more; a coin gets 14/24.
    """

    name = "reroll"
    max_turns = 2
    max_completion_tokens = 4
    stop = tuple(word for word in VOCABULARY if len(word) == 1)  # one word is a turn

    def problem(self, row):
        self.check_row(row)
        return Problem(row, f"1 2 3 4 -> {row % 90} :", {}, str(row))

    def respond(self, problem, turns, draws):
        over = len(turns) == 2
        if over and self.keeps(turns[1].completion):
            return Reply(over=True, status="kept")
        return Reply(str(1 + draws.below(6)), over=over)

    def keeps(self, word):
        return word.strip().isdigit() and int(word) % 2 == 1

    def grade_turns(self, problem, turns, *, truncated):
        rolls = [turn.reply.text for turn in turns if turn.reply and turn.reply.text]
        return Grade(int(rolls[-1]) / 6 if len(turns) == 2 else 0.0, "ok")
