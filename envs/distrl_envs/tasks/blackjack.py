"""Blackjack: play one hand against the dealer; what each move brings is a matter of chance."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Reply, Turn, played

if TYPE_CHECKING:
    import numpy as np

HIT, STAND, DOUBLE = MOVES = "+", "=", "*"
WORDS = {"hit": HIT, "stand": STAND, "double": DOUBLE}
WORD = re.compile(r"\b(hit|stand|double)\b", re.IGNORECASE)
STATE = re.compile(r"(\d+) , ([01]) -> (\d+)$")

RANKS = 13
CARDS = {**dict.fromkeys(range(1, 10), 1 / RANKS), 10: 4 / RANKS}
"""Value of a card, an ace being 1, to its probability: a deck without end."""
MOST = 21
DEALER_STANDS = 17
LEAST_STAKE_RESULT, SCALE = -2, 4
"""A score is (stakes won + 2) / 4: a doubled stake that is lost gives 0, one that is won 1."""


V = TypeVar("V", int, float)


class State(NamedTuple):
    """What a player knows, and all that the rest of a game depends on.

    Attributes:
        total: Of the player's cards.
        soft: Whether an ace among them counts 11.
        dealer: The dealer's open card.
    """

    total: int
    soft: bool
    dealer: int

    def text(self) -> str:
        """As the model reads it."""
        return f"{self.total} , {int(self.soft)} -> {self.dealer}"


Policy = Callable[[State], Mapping[str, float]]
"""The probability of each move in a state; moves left out are never made."""
Law = dict[float, float]
"""Scores to their probabilities."""


class BlackjackTask(GeneratedTask):
    """One hand of Blackjack, with hitting, standing and doubling.

    Rules, after Sutton and Barto (2018), Example 5.1, and doubling: cards come from a deck without
    end, faces count 10, aces 11 where that does not exceed 21, else 1. The dealer shows one card,
    draws below 17 and stands from there on. Two cards that are 21 at once are never dealt to the
    player: there would be nothing to decide. At 21 the hand ends by itself.

    The prompt `10 6 ; 16 , 0 -> 9 :` has the player's cards; their total; how many aces of them
    count 11; the dealer's card. A turn is one move, `+` (hit), `=` (stand) or `*` (double: one last
    card at twice the stake, in any turn), or the last of the words hit, stand and double in it. A
    hit is answered by the card and what it makes, `2 ; 18 , 0 -> 9`. Different hands may come to
    the same total, also across splits.

    The score is (stakes won + 2) / 4: 1 for a doubled stake won, .75 for one won, .5 for a draw,
    .25 for one lost, 0 for a doubled one lost. Anything else than a move ends the hand
    with 0, status `malformed`. A hand that is won is `correct`, others are `drawn` or `wrong`.
    """

    name = "blackjack"
    names_answers = False
    critic_numbers = ("total", "soft", "dealer", "hit", "stand", "double", "malformed", "turn")
    max_turns = 18  # 17 hits at most stay below 21
    max_prompt_tokens = 9
    max_completion_tokens = 2 * max_turns  # a move and EOS each
    max_reply_tokens = 8

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str] | None:
        """Deals two cards to the player and one to the dealer."""
        cards = sorted((_card(draws), _card(draws)))
        state = _dealt(cards, _card(draws))
        if state.total == MOST:
            return None
        shown = " ".join(map(str, cards))
        problem = Problem(
            row,
            f"{shown} ; {state.text()} :",
            {"cards": tuple(cards), "dealer": state.dealer},
            f"{shown}|{state.dealer}",
        )
        return problem, best_move(state)

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """The first move with the highest expected score."""
        return best_move(self.state(problem, ()))

    def demonstration(
        self, problem: Problem, rng: np.random.Generator, solution: str | None = None
    ) -> list[Turn]:
        """A hand with moves at random, each as likely as the others."""

        def move(problem: Problem, turns: Sequence[Turn]) -> str:
            return MOVES[int(rng.integers(len(MOVES)))]

        return played(self, problem, move, rng)

    def instruction(self, problem: Problem) -> str:
        """The rules and the cards in English."""
        state = self.state(problem, ())
        return (
            "Play one hand of Blackjack. Cards come from an endless deck; face cards count 10, an "
            "ace 11 if that does not make more than 21, else 1. The dealer draws up to 17 and "
            f"stands from there on. Your cards are {' and '.join(map(str, problem.data['cards']))} "
            f"(1 is an ace), {state.total} together, and the dealer shows {state.dealer}. Say hit "
            "(take a card), stand (no more cards) or double (one last card at twice the stake). "
            "After a hit I show: your new card ; your total , how many of "
            "your aces count 11 -> the dealer's card. End each turn with one of the three words."
        )

    def state(self, problem: Problem, turns: Sequence[Turn]) -> State:
        """The state after some turns with their replies."""
        if not turns:
            return _dealt(problem.data["cards"], problem.data["dealer"])
        total, soft, dealer = _shown(turns[-1].reply)
        return State(total, bool(soft), dealer)

    def critic_observation(
        self, problem: Problem, turns: Sequence[Turn], texts: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """The hand and the move of this turn.

        The total / 21, whether an ace of it counts 11, the dealer's card / 10; whether the turn
        says to hit, to stand, to double, or something that is no move; the number of turns before
        it as a share of `max_turns`.
        """
        state, found = self.state(problem, turns), []
        hand = (state.total / MOST, float(state.soft), state.dealer / 10)
        for text in texts:
            move = _move(text)
            said = [float(move == word) for word in (HIT, STAND, DOUBLE)]
            malformed = float(bool(text.strip()) and move is None)
            found.append((*hand, *said, malformed, len(turns) / self.max_turns))
        return found

    def respond(self, problem: Problem, turns: Sequence[Turn], draws: Draws) -> Reply:
        """The next card, or how the hand ends."""
        state = self.state(problem, turns[:-1])
        move = _move(turns[-1].completion)
        if move is None:
            return Reply(over=True, status="malformed")
        total, soft, shown = state.total, state.soft, ""
        if move != STAND:
            card = _card(draws)
            total, soft = _with_card(total, soft, card)
            shown = f"{card} ; "
        if total < MOST and move == HIT:
            return Reply(shown + State(total, soft, state.dealer).text())
        dealer, dealer_soft = _with_card(0, False, state.dealer)
        while dealer < DEALER_STANDS and total <= MOST:
            dealer, dealer_soft = _with_card(dealer, dealer_soft, _card(draws))
        return Reply(f"{shown}{total} , {int(soft)} -> {dealer}", over=True)

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """Grades a hand that was left after its first move: it is lost."""
        return self.grade_turns(problem, [Turn(completion)], truncated=truncated)

    def grade_turns(self, problem: Problem, turns: Sequence[Turn], *, truncated: bool) -> Grade:
        """The score as the class says; a hand that is not played to its end gives 0, `too_long`."""
        reply = turns[-1].reply
        if reply is None or not reply.over:
            return Grade(0.0, "too_long")
        if reply.status == "malformed":
            return Grade(0.0, "malformed")
        total, _, dealer = _shown(reply)
        stake = 2 if _move(turns[-1].completion) == DOUBLE else 1
        result = _result(total, dealer)
        return Grade(_score(stake * result), ("wrong", "drawn", "correct")[result + 1])


def best_move(state: State) -> str:
    """The move with the highest expected score; the first of equals, as `MOVES` has them."""
    return max(MOVES, key=lambda move: mean(_after(state, move, None)))


def uniform(state: State) -> Mapping[str, float]:
    """The policy that makes each move as likely as the others: that of demonstrations."""
    return dict.fromkeys(MOVES, 1.0 / len(MOVES))


def return_law(state: State, policy: Policy | None = None) -> Law:
    """The true law of the score from a state on, by dynamic programming.

    Args:
        state: A state in which a move is due, with less than 21.
        policy: Who plays; None for the policy with the highest expected score.
    """
    moves = {best_move(state): 1.0} if policy is None else policy(state)
    return _mixture((share, _after(state, move, policy)) for move, share in moves.items())


def visits(policy: Policy | None = None) -> dict[State, float]:
    """How often a state is met in a hand, on average, by the player of `return_law`."""
    met: dict[State, float] = {}
    for cards in product(CARDS, CARDS, CARDS):
        state = _dealt(cards[:2], cards[2])
        if state.total < MOST:
            met[state] = met.get(state, 0.0) + prod(CARDS[card] for card in cards)
    met = {state: chance / sum(met.values()) for state, chance in met.items()}
    for least in range(2, MOST):  # the total with all aces as 1: each card raises it
        for state in [state for state in met if state.total - 10 * state.soft == least]:
            moves = {best_move(state): 1.0} if policy is None else policy(state)
            for card, share in CARDS.items():
                total, soft = _with_card(state.total, state.soft, card)
                if total < MOST and HIT in moves:
                    after = State(total, soft, state.dealer)
                    met[after] = met.get(after, 0.0) + met[state] * moves[HIT] * share
    return met


def mean(law: Law) -> float:
    """The expectation of a law."""
    return sum(score * share for score, share in law.items())


@lru_cache(maxsize=1 << 14)
def _after(state: State, move: str, policy: Policy | None) -> Law:
    """The law of the score after a move."""
    if move == STAND:
        return _standing(state.total, state.dealer, 1)
    laws = []
    for card, share in CARDS.items():
        total, soft = _with_card(state.total, state.soft, card)
        if move == HIT and total < MOST:
            laws.append((share, return_law(State(total, soft, state.dealer), policy)))
        else:
            laws.append((share, _standing(total, state.dealer, 2 if move == DOUBLE else 1)))
    return _mixture(laws)


def _standing(total: int, dealer: int, stake: int) -> Law:
    ends = dealer_law(*_with_card(0, False, dealer))
    return _mixture(
        (share, {_score(stake * _result(total, end)): 1.0}) for end, share in ends.items()
    )


@cache
def dealer_law(total: int, soft: bool) -> Mapping[int, float]:
    """The law of the total at which a dealer ends who has this one, above 21 included."""
    if total >= DEALER_STANDS:
        return {total: 1.0}
    return _mixture(
        (share, dealer_law(*_with_card(total, soft, card))) for card, share in CARDS.items()
    )


def _mixture(laws: Iterable[tuple[float, Mapping[V, float]]]) -> dict[V, float]:
    mixed: dict[V, float] = {}
    for weight, law in laws:
        for value, share in law.items():
            mixed[value] = mixed.get(value, 0.0) + weight * share
    return mixed


def _result(total: int, dealer: int) -> int:
    """1 where the player wins, 0 for a draw, -1 where the dealer does."""
    if total > MOST:
        return -1
    return 1 if dealer > MOST else (total > dealer) - (total < dealer)


def _score(stakes: int) -> float:
    return (stakes - LEAST_STAKE_RESULT) / SCALE


def _card(draws: Draws) -> int:
    return min(draws.below(RANKS) + 1, 10)


def _with_card(total: int, soft: bool, card: int) -> tuple[int, bool]:
    total += card
    if card == 1 and not soft and total + 10 <= MOST:
        return total + 10, True
    return (total - 10, False) if soft and total > MOST else (total, soft)


def _dealt(cards: Sequence[int], dealer: int) -> State:
    total, soft = _with_card(*_with_card(0, False, cards[0]), cards[1])
    return State(total, soft, dealer)


def _shown(reply: Reply | None) -> tuple[int, int, int]:
    found = STATE.search(reply.text) if reply is not None else None
    if found is None:
        raise ValueError(f"Got the turns' last reply {reply!r}; it must be one of Blackjack's own.")
    total, soft, dealer = map(int, found.groups())
    return total, soft, dealer


def _move(completion: str) -> str | None:
    """The move of a turn; None where there is none."""
    text = completion.strip()
    if text in WORDS.values():
        return text
    words = WORD.findall(text)
    return WORDS[words[-1].lower()] if words else None
