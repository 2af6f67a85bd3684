"""Tasks that reply: Blackjack with its law, Mastermind, and Countdown with a checking tool."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distrl_envs import TokenEnv, make_task
from distrl_envs.task import SPLITS, Draws, Problem, Reply, TaskError, Turn, played, split_of
from distrl_envs.tasks.blackjack import (
    BlackjackTask,
    State,
    best_move,
    dealer_law,
    mean,
    return_law,
    uniform,
    visits,
)
from distrl_envs.tasks.countdown_check import CountdownCheckTask
from distrl_envs.tasks.mastermind import MastermindTask, all_codes, feedback, feedback_of_all
from distrl_envs.tokenizers import EOS, VOCABULARY, small_tokenizer
from distrl_envs.turns import EnvReply
from tests.envs.byte_tokenizer import byte_tokenizer

GAMES = ("blackjack", "mastermind", "countdown_check")
BLACKJACK, CHECK = BlackjackTask(), CountdownCheckTask()
MASTERMIND = MastermindTask(places=3, guesses=6)
HAND = Problem(
    0, "6 10 ; 16 , 0 -> 9 :", {"cards": (6, 10), "dealer": 9}, "6 10|9",
)  # fmt: skip
CODE = Problem(
    0, "3 4 5 -> 0 , 0 :", {"code": (1, 2, 2), "opening": (3, 4, 5)}, "6|1 2 2|3 4 5",
)  # fmt: skip
NUMBERS = Problem(0, "3 4 7 9 -> 24 :", {"numbers": (3, 4, 7, 9), "target": 24}, "3 4 7 9|24")
EOS_ID = VOCABULARY[EOS]
SOLVED = "3 * 4 = 12 , 9 - 7 = 2 , 12 * 2 = 24"


def completions(*texts):
    """A move that plays texts in order."""
    return lambda _, turns: texts[len(turns)]


def game(task, problem, *texts, seed=0):
    """An episode of given completions."""
    return played(task, problem, completions(*texts), np.random.default_rng(seed))


class Cards(Draws):
    """Draws that deal given cards."""

    def __init__(self, *cards):
        super().__init__(b"")
        self._cards = list(cards)

    def below(self, bound):
        assert bound == 13
        return self._cards.pop(0) - 1


# --- what all of them have in common


@pytest.mark.parametrize("name", GAMES)
def test_demonstrations_are_whole_legal_episodes_in_the_small_vocabulary(name):
    rng = np.random.default_rng(0)
    task = make_task(name, split="validation")
    for _ in range(200):
        problem, turns = task.sample_demonstration(rng)
        assert split_of(problem.key) == "validation"
        assert 1 <= len(turns) <= task.max_turns
        words = problem.prompt.split()
        assert len(words) <= task.max_prompt_tokens
        sampled = [turn.completion.split() for turn in turns]
        assert sum(len(one) + 1 for one in sampled) <= task.max_completion_tokens
        words += [word for one in sampled for word in one]
        words += [word for turn in turns if turn.reply for word in turn.reply.text.split()]
        assert set(words) <= set(VOCABULARY)
        over = [turn.reply is None or turn.reply.over for turn in turns]
        assert over == [False] * (len(turns) - 1) + [True]
        assert {turn.reply.status for turn in turns if turn.reply} <= {"ok", "out_of_range"}
        grade = task.grade_turns(problem, turns, truncated=False)
        assert 0.0 <= grade.score <= 1.0 and grade.status in ("correct", "drawn", "wrong")


@pytest.mark.parametrize("name", GAMES)
def test_demonstrations_are_reproducible_and_imperfect_enough_to_learn_from(name):
    task = make_task(name)
    first, again = (
        [task.sample_demonstration(np.random.default_rng(seed)) for seed in range(300)]
        for _ in range(2)
    )
    assert first == again
    assert len({tuple(turns) for _, turns in first}) > 200
    lengths = Counter(len(turns) for _, turns in first)
    assert len(lengths) >= 4
    totals = [
        task.grade_turns(problem, turns, truncated=False).score
        + sum(turn.reply.reward for turn in turns if turn.reply)
        for problem, turns in first
    ]
    assert 0.2 < np.mean(totals) < 0.97 and np.std(totals) > 0.02


@pytest.mark.parametrize("name", GAMES)
def test_an_episode_in_the_token_environment_is_the_one_that_was_played(name):
    """The reply's tokens are those of a demonstration, and so are rewards, turns and the score."""
    env = TokenEnv(name, obs_mode="incremental")
    row, address = 5, (0, 5, 0, 0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        planned = env.task.demonstration(env.task.problem(row), rng)
        env.reset(options={"row": row, "address": address})
        rewards, infos = [], []
        for turn in planned:
            for token in [*small_tokenizer().encode(turn.completion), EOS_ID]:
                observation, reward, over, _, info = env.step(token)
                rewards.append(reward)
            infos.append(info)
            if over:
                break
            reply = info["reply"]
            new = observation[1 : 1 + observation[0]].tolist()[1:]
            assert small_tokenizer().decode(new) == f"{reply.text} :"
            if name != "blackjack":  # Whose replies are chance; the others' are planned.
                assert reply == turn.reply
        if over:
            turns = infos[-1]["turns"]
            grade = env.task.grade_turns(env.task.problem(row), turns, truncated=False)
            assert infos[-1]["grade"] == grade and infos[-1]["finish_reason"] == "stop"
            assert sum(rewards) == pytest.approx(
                grade.score + sum(turn.reply.reward for turn in turns if turn.reply)
            )


@pytest.mark.parametrize("name", GAMES)
@given(text=st.one_of(st.text(), st.text(alphabet="0123456789+-*=,: \n<guess>/hitsand")))
def test_any_text_gets_a_reply_and_a_grade(name, text):
    task = make_task(name)
    problem = task.problem(0)
    reply = task.respond(problem, [Turn(text)], Draws(b"x"))
    turns = [Turn(text, reply)]
    for cut in (False, True):
        grade = task.grade_turns(problem, turns, truncated=cut)
        assert 0.0 <= grade.score <= 1.0
    assert task.grade(problem, text).score <= 1.0


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize(
    "text",
    ["1 " * 99_999, "hit " * 99_999, "<guess>" * 50_000, "9" * 300_000, "1 + " * 99_999 + "="],
)
def test_time_is_about_linear(name, text):
    task = make_task(name)
    reply = task.respond(task.problem(0), [Turn(text)], Draws(b"x"))
    task.grade_turns(task.problem(0), [Turn(text, reply)], truncated=False)


@pytest.mark.parametrize("name", GAMES)
def test_the_instruction_names_the_problem_and_the_form_of_a_turn(name):
    task = make_task(name)
    env = TokenEnv(task, tokenizer=byte_tokenizer(), max_prompt_tokens=2_000)
    text = task.instruction(task.problem(3))
    assert text != task.problem(3).prompt and len(text) > 100
    assert env.tokenizer.decode(env.prompt_ids(task.problem(3))).startswith(text[:40])


@pytest.mark.parametrize(
    ("name", "config", "refusal"),
    [
        ("mastermind", {"places": 6}, r"places=6; Mastermind takes 2\.\.5"),
        ("mastermind", {"numbers": 11}, r"numbers=11; Mastermind takes 2\.\.10"),
        ("mastermind", {"guesses": 1}, r"guesses=1; Mastermind takes 2\.\.20"),
        ("mastermind", {"places": 5, "numbers": 10}, "100,000 codes"),
        ("countdown_check", {"checks": 0}, r"checks=0; it must be in 1\.\.20"),
        ("countdown_check", {"check_cost": -0.1}, r"check_cost=-0\.1; it must be in 0\.\.1"),
        ("countdown_check", {"check_cost": float("nan")}, "check_cost=nan"),
        ("blackjack", {"decks": 6}, "decks"),
    ],
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(name, config, refusal):
    with pytest.raises(ValueError, match=refusal):
        make_task(name, **config)


def test_an_episode_that_never_ends_is_an_error():
    class Endless(MastermindTask):
        def respond(self, problem, turns, draws):
            return Reply("1 , 1")

    with pytest.raises(TaskError, match=r"Endless\.respond\(\).*did not end.*turn 5"):
        game(Endless(), CODE, *["1 1 1"] * 5)


# --- Blackjack: rules


def test_a_hand_worked_out():
    """10 and 6 against 9: a 2, then stand; the dealer turns a 5 and a 10."""
    hit = BLACKJACK.respond(HAND, [Turn("+")], Cards(2))
    assert hit == Reply("2 ; 18 , 0 -> 9")
    turns = [Turn("+", hit), Turn("=")]
    stand = BLACKJACK.respond(HAND, turns, Cards(5, 13))
    assert stand == Reply("18 , 0 -> 24", over=True)
    turns[-1] = Turn("=", stand)
    grade = BLACKJACK.grade_turns(HAND, turns, truncated=False)
    assert (grade.score, grade.status) == (0.75, "correct")


@pytest.mark.parametrize(
    ("move", "cards", "text", "score", "status"),
    [
        ("=", (7,), "16 , 0 -> 16", None, None),  # the dealer draws on
        ("=", (8,), "16 , 0 -> 17", 0.25, "wrong"),
        ("=", (1,), "16 , 0 -> 20", 0.25, "wrong"),  # an ace counts 11
        ("=", (2, 1, 13), "16 , 0 -> 22", 0.75, "correct"),  # 9 2 A 10: the ace counts 1
        ("*", (5, 12), "5 ; 21 , 0 -> 19", 1.0, "correct"),
        ("*", (3, 13), "3 ; 19 , 0 -> 19", 0.5, "drawn"),
        ("*", (1, 13), "1 ; 17 , 0 -> 19", 0.0, "wrong"),
        ("*", (11,), "10 ; 26 , 0 -> 9", 0.0, "wrong"),
        ("+", (11,), "10 ; 26 , 0 -> 9", 0.25, "wrong"),  # the dealer need not draw
        ("+", (5, 13), "5 ; 21 , 0 -> 19", 0.75, "correct"),  # 21 ends the hand
        ("I would hit, no: STAND.", (8,), "16 , 0 -> 17", 0.25, "wrong"),
        ("Double!", (5, 12), "5 ; 21 , 0 -> 19", 1.0, "correct"),
    ],
)  # fmt: skip
def test_replies_and_scores_by_hand(move, cards, text, score, status):
    if score is None:
        with pytest.raises(IndexError):
            BLACKJACK.respond(HAND, [Turn(move)], Cards(*cards))
        return
    reply = BLACKJACK.respond(HAND, [Turn(move)], Cards(*cards))
    assert reply == Reply(text, over=True)
    grade = BLACKJACK.grade_turns(HAND, [Turn(move, reply)], truncated=False)
    assert (grade.score, grade.status) == (score, status)


def test_soft_hands():
    soft = Problem(0, "", {"cards": (1, 6), "dealer": 10}, "")
    assert BLACKJACK.state(soft, ()) == State(17, True, 10)
    assert BLACKJACK.respond(soft, [Turn("+")], Cards(3)).text == "3 ; 20 , 1 -> 10"
    assert BLACKJACK.respond(soft, [Turn("+")], Cards(9)).text == "9 ; 16 , 0 -> 10"
    pair = Problem(0, "", {"cards": (1, 1), "dealer": 10}, "")
    assert BLACKJACK.state(pair, ()) == State(12, True, 10)
    assert BLACKJACK.respond(pair, [Turn("+")], Cards(13)).text == "10 ; 12 , 0 -> 10"


@pytest.mark.parametrize("text", ["", "-", "+ =", "+ +", "take one", "hits", "3", "= ;", "<unk>"])
def test_a_malformed_move_ends_the_hand_with_nothing(text):
    reply = BLACKJACK.respond(HAND, [Turn(text)], Cards())
    assert (reply.over, reply.status) == (True, "malformed")
    grade = BLACKJACK.grade_turns(HAND, [Turn(text, reply)], truncated=False)
    assert (grade.score, grade.status) == (0.0, "malformed")


def test_a_later_turn_doubles_too():
    turns = [Turn("+", BLACKJACK.respond(HAND, [Turn("+")], Cards(2))), Turn("*")]
    turns[-1] = Turn("*", BLACKJACK.respond(HAND, turns, Cards(3, 13)))
    assert turns[-1].reply == Reply("3 ; 21 , 0 -> 19", over=True)
    assert BLACKJACK.grade_turns(HAND, turns, truncated=False).score == 1.0


def test_a_hand_that_is_left_scores_nothing():
    hit = BLACKJACK.respond(HAND, [Turn("+")], Cards(2))
    for turns in ([Turn("+", hit)], [Turn("+", hit), Turn("=")]):
        grade = BLACKJACK.grade_turns(HAND, turns, truncated=True)
        assert (grade.score, grade.status) == (0.0, "too_long")


def test_replies_depend_on_their_arguments_alone():
    first = [BLACKJACK.respond(HAND, [Turn("+")], Draws(b"%d" % i)) for i in range(50)]
    again = [BlackjackTask().respond(HAND, [Turn("+")], Draws(b"%d" % i)) for i in range(50)]
    assert first == again
    assert len(set(first)) > 8


def test_no_hand_is_longer_than_the_task_allows():
    """Only aces, and one 2 in place of the ace that would make 21: the longest hand there is."""
    problem = Problem(0, "", {"cards": (1, 1), "dealer": 10}, "")
    cards, turns = [*[1] * 8, 2, *[1] * 8, 13], []
    for card in cards:
        reply = BLACKJACK.respond(problem, [*turns, Turn("+")], Cards(card))
        turns.append(Turn("+", reply))
        assert reply.over == (len(turns) == len(cards)), turns
    assert len(turns) == BLACKJACK.max_turns


# --- Blackjack: the law


def test_the_dealers_law_by_hand_and_as_published():
    """From a hard 16 each of 17..21 has one card, 6..10 break; 15 may pass through 16."""
    law = dealer_law(16, False)
    assert {total: law[total] for total in range(17, 22)} == pytest.approx(
        dict.fromkeys(range(17, 22), 1 / 13)
    )
    breaks = sum(share for total, share in law.items() if total > 21)
    assert breaks == pytest.approx(8 / 13)
    law = dealer_law(15, False)
    assert law[17] == pytest.approx(1 / 13 + 1 / 169)
    assert sum(law[total] for total in law if total > 21) == pytest.approx(7 / 13 + 8 / 169)
    # Chances to break with an endless deck, standing on all 17s, as tables for players give them.
    published = {2: 0.3536, 3: 0.3739, 4: 0.3945, 5: 0.4164, 6: 0.4232, 7: 0.2623, 8: 0.2447,
                 9: 0.2284, 10: 0.2121}  # fmt: skip
    for card, chance in published.items():
        law = dealer_law(card, False)
        assert sum(law[total] for total in law if total > 21) == pytest.approx(chance, abs=6e-5)
    law = dealer_law(11, True)
    assert sum(law[total] for total in law if total > 21) == pytest.approx(0.1153, abs=6e-5)


def test_laws_by_hand():
    """Twenty against a dealer's 10: what is lost to 21, drawn with 20 and won otherwise."""
    dealer = dealer_law(10, False)
    stands = return_law(State(20, False, 10), lambda state: {"=": 1.0})
    won = 1.0 - dealer[20] - dealer[21]
    assert stands == pytest.approx({0.75: won, 0.5: dealer[20], 0.25: dealer[21]})
    hits = return_law(State(20, False, 10), lambda state: {"+": 1.0})
    assert hits == pytest.approx({0.25: 12 / 13, 0.5: dealer[21] / 13, 0.75: (1 - dealer[21]) / 13})
    doubles = return_law(State(20, False, 10), lambda state: {"*": 1.0})
    assert doubles == pytest.approx(
        {0.0: 12 / 13, 0.5: dealer[21] / 13, 1.0: (1 - dealer[21]) / 13}
    )
    mixed = return_law(State(20, False, 10), lambda state: {"=": 0.5, "*": 0.5})
    assert mixed[1.0] == pytest.approx((1 - dealer[21]) / 26)


def test_the_best_player_plays_as_the_books_say():
    hard = {(11, 6): "*", (10, 9): "*", (9, 7): "+", (8, 5): "+", (12, 2): "+", (12, 4): "=",
            (13, 2): "=", (16, 7): "+", (16, 6): "=", (17, 1): "=", (20, 6): "="}  # fmt: skip
    for (total, dealer), move in hard.items():
        assert best_move(State(total, False, dealer)) == move, (total, dealer)
    soft = {(18, 9): "+", (18, 7): "=", (18, 5): "*", (17, 7): "+", (19, 10): "="}
    for (total, dealer), move in soft.items():
        assert best_move(State(total, True, dealer)) == move, (total, dealer)


def test_no_policy_beats_the_best_one():
    for state in visits():
        best = mean(return_law(state))
        for policy in (uniform, lambda state: {"=": 1.0}, lambda state: {"+": 0.5, "=": 0.5}):
            assert mean(return_law(state, policy)) <= best + 1e-12


def simulated(state, policy, rng):
    """A hand by counting cards afresh each time, with NumPy's numbers: the score."""
    worth = lambda cards: sum(cards) + 10 * (1 in cards and sum(cards) <= 11)  # noqa: E731
    deal = lambda: min(int(rng.integers(1, 14)), 10)  # noqa: E731
    mine = [1, state.total - 11] if state.soft else [state.total - 2, 2]
    dealer, stake = [state.dealer], 1
    while worth(mine) < 21:
        moves = policy(State(worth(mine), 1 in mine and sum(mine) <= 11, state.dealer))
        move = rng.choice(list(moves), p=list(moves.values()))
        if move == "=":
            break
        mine.append(deal())
        if move == "*":
            stake = 2
            break
    if worth(mine) > 21:
        return (2 - stake) / 4
    while worth(dealer) < 17:
        dealer.append(deal())
    gap = worth(mine) - worth(dealer) if worth(dealer) <= 21 else 1
    return (2 + stake * int(np.sign(gap))) / 4


def fits(scores, law):
    """The p-value of a chi-squared test that scores came from a law."""
    values = sorted(law)
    counts = Counter(scores)
    assert set(counts) <= set(values)
    return stats.chisquare(
        [counts[value] for value in values], [law[value] * len(scores) for value in values]
    ).pvalue


def best(state):
    return {best_move(state): 1.0}


@pytest.mark.parametrize("policy", [best, uniform], ids=["best", "uniform"])
@pytest.mark.parametrize("state", [State(16, False, 9), State(17, True, 5), State(11, False, 6)])
def test_the_law_is_that_of_hands_simulated_another_way(state, policy):
    rng = np.random.default_rng(1)
    scores = [simulated(state, policy, rng) for _ in range(4_000)]
    assert fits(scores, return_law(state, policy)) > 1e-3
    assert return_law(state, best) == pytest.approx(return_law(state))


@pytest.mark.parametrize("policy", [best, uniform], ids=["best", "uniform"])
def test_the_law_is_that_of_the_tasks_own_episodes(policy):
    rng = np.random.default_rng(2)

    def move(problem, turns):
        moves = policy(BLACKJACK.state(problem, turns))
        return str(rng.choice(list(moves), p=list(moves.values())))

    for cards in ((6, 10), (1, 6)):
        problem = Problem(0, "", {"cards": cards, "dealer": 9}, "")
        scores = []
        for _ in range(3_000):
            turns = played(BLACKJACK, problem, move, rng)
            scores.append(BLACKJACK.grade_turns(problem, turns, truncated=False).score)
        assert fits(scores, return_law(BLACKJACK.state(problem, ()), policy)) > 1e-3


def test_visits_are_those_of_dealt_hands():
    rng = np.random.default_rng(3)
    met = Counter()
    hands = 3_000
    for _ in range(hands):
        problem, turns = BLACKJACK.sample_demonstration(rng)
        met.update(BLACKJACK.state(problem, turns[:i]).total for i in range(len(turns)))
    # `sample_demonstration` keeps to the problems of a split; a total has many of them.
    expected = Counter()
    for state, share in visits(uniform).items():
        expected[state.total] += share
    assert sum(visits(lambda state: {"=": 1.0}).values()) == pytest.approx(1.0)
    assert sum(met.values()) / hands == pytest.approx(sum(expected.values()), rel=0.03)
    for total in (12, 16, 20):
        assert met[total] / hands == pytest.approx(expected[total], rel=0.25)


# --- Mastermind


@pytest.mark.parametrize(
    ("guess", "code", "told"),
    [
        ((1, 2, 2), (1, 2, 2), (3, 0)),
        ((2, 1, 2), (1, 2, 2), (1, 2)),
        ((2, 2, 1), (1, 2, 2), (1, 2)),
        ((2, 2, 2), (1, 2, 2), (2, 0)),
        ((1, 1, 1), (1, 2, 2), (1, 0)),
        ((2, 1, 1), (1, 2, 2), (0, 2)),
        ((3, 4, 5), (1, 2, 2), (0, 0)),
        ((1, 1, 2, 2), (2, 2, 1, 1), (0, 4)),
        ((1, 2, 3, 4), (1, 3, 2, 2), (1, 2)),
    ],
)
def test_feedback_by_hand(guess, code, told):
    assert feedback(guess, code) == told
    codes = all_codes(len(guess), 6)
    assert feedback_of_all(guess, 6)[codes.index(code)] == told
    assert len(codes) == 6 ** len(guess)


def test_a_code_found_with_the_third_guess():
    turns = game(MASTERMIND, CODE, "1 1 3", "2 1 2", "1 2 2")
    assert [turn.reply.text for turn in turns] == ["1 , 0", "1 , 2", "3 , 0"]
    assert [turn.reply.over for turn in turns] == [False, False, True]
    grade = MASTERMIND.grade_turns(CODE, turns, truncated=False)
    assert (grade.score, grade.status) == (pytest.approx(1 - 2 / 6), "correct")


def test_a_code_that_is_not_found():
    turns = game(MASTERMIND, CODE, *["1 1 3"] * 6)
    assert [turn.reply.over for turn in turns] == [False] * 5 + [True]
    assert MASTERMIND.grade_turns(CODE, turns, truncated=False).status == "wrong"
    assert MASTERMIND.grade_turns(CODE, turns[:3], truncated=True).status == "too_long"


@pytest.mark.parametrize(
    "text",
    ["", "1 2", "1 2 2 2", "0 1 2", "7 1 2", "1 2 2 .", "1 2 2 1 1 1", "the code is 1 2 2", "- 1 2",
     "<guess>1 2</guess>", "1 2 2 <guess></guess>", "<guess>1 2 2</guess><guess>", "1;2;2",
     "\u0661 2 2", "1 , , 2"],
)  # fmt: skip
def test_what_is_no_guess_is_marked_and_spent(text):
    turns = game(MASTERMIND, CODE, text, "1 2 2")
    assert turns[0].reply == Reply("-", status="malformed")
    grade = MASTERMIND.grade_turns(CODE, turns, truncated=False)
    assert (grade.score, grade.status) == (pytest.approx(1 - 1 / 6), "correct")


@pytest.mark.parametrize(
    "text",
    [
        "1 2 2",
        " 1,2,2\n",
        "1, 2, 2",
        "Maybe <guess>3 3 3</guess>, no: <guess> 1 2 2 </guess> .",
        "<think>1 1 1</think><guess>1 2 2",
    ],
)
def test_spellings_of_a_guess(text):
    assert game(MASTERMIND, CODE, text)[0].reply.text == "3 , 0"


def test_a_prompt_is_an_opening_and_what_it_tells_and_replies_need_no_chance():
    codes = {}
    for row in range(400):
        problem = MASTERMIND.problem(row)
        opening, code = problem.data["opening"], problem.data["code"]
        exact, misplaced = feedback(opening, code)
        shown = " ".join(map(str, opening))
        assert problem.prompt == f"{shown} -> {exact} , {misplaced} :" and opening != code
        assert shown in MASTERMIND.instruction(problem)
        codes.setdefault(problem.prompt, set()).add(code)
    assert max(map(len, codes.values())) > 1
    replies = {MASTERMIND.respond(CODE, [Turn("2 1 2")], Draws(b"%d" % i)) for i in range(5)}
    assert replies == {Reply("1 , 2")}


def test_an_opening_leaves_its_codes_equally_likely():
    task, draws = MastermindTask(numbers=3), Draws(b"openings")
    drawn = [task.attempt(draws, 0) for _ in range(4_000)]
    counts = Counter((one[0].prompt, one[0].data["code"]) for one in drawn if one)
    # An opening of two numbers has one right with 2 x 2/3 x 1/3, none with 1/9, given its code.
    assert sum(one is None for one in drawn) / 4_000 == pytest.approx(4 / 9, abs=0.04)
    for prompt, codes in (("1 2 -> 1 , 0 :", 4), ("1 1 -> 0 , 0 :", 4), ("1 2 -> 0 , 1 :", 2)):
        found = [counts[shown, code] for shown, code in counts if shown == prompt]
        assert len(found) == codes and stats.chisquare(found).pvalue > 1e-3


def test_the_codes_that_are_left_by_hand():
    assert len(MASTERMIND.allowed(CODE, ())) == 27  # none of 3, 4, 5
    left = MASTERMIND.allowed(CODE, [Turn("1 1 2"), Turn("no guess")])
    assert left == [(1, 1, 1), (1, 1, 6), (1, 2, 2), (1, 6, 2), (2, 1, 2), (6, 1, 2)]


def test_two_difficulties_are_two_tasks():
    easy = {MASTERMIND.problem(row).key for row in range(30)}
    assert not easy & {MastermindTask(numbers=5).problem(row).key for row in range(30)}


def test_all_splits_have_all_games():
    for split in SPLITS:
        task = MastermindTask(split, numbers=2)
        games = {tuple(task.problem(row).data.values()) for row in range(200)}
        assert len(games) == 4 * 3


# --- Countdown with a checking tool


def test_questions_are_answered_and_paid_for():
    turns = game(CHECK, NUMBERS, "3 * 4 =", "9 - 7 =", SOLVED)
    assert turns[0].reply == Reply("12", role="tool", reward=-0.02)
    assert turns[1].reply == Reply("2", role="tool", reward=-0.02)
    assert turns[2].reply is None
    assert CHECK.grade_turns(NUMBERS, turns, truncated=False).score == 1.0


@pytest.mark.parametrize(
    ("text", "reply", "status"),
    [
        ("12 * 9 =", "-", "out_of_range"),
        ("3 - 9 =", "-", "out_of_range"),
        ("99 + 0 =", "99", "ok"),
        ("Let me see. What is\n9 \u00d7 7 = ", "63", "ok"),
        ("I wonder: 9-7=", "2", "ok"),
        ("=", "-", "malformed"),
        ("3 * =", "-", "malformed"),
        ("3 * 4 = =", "-", "malformed"),
        ("3 * 4 * 7 =", "-", "malformed"),
        ("8 / 2 =", "-", "malformed"),
        ("3 * 4 = 12 , 9 - 7 =", "2", "ok"),
    ],
)
def test_questions_of_all_kinds(text, reply, status):
    expected = Reply(reply, role="tool", reward=-0.02, status=status)
    assert CHECK.respond(NUMBERS, [Turn(text)], Draws(b"")) == expected


def test_who_only_asks_has_no_answer():
    turns = game(CHECK, NUMBERS, *["3 * 4 ="] * 5)
    assert len(turns) == CHECK.max_turns == 5
    assert turns[-1].reply.over
    grade = CHECK.grade_turns(NUMBERS, turns, truncated=False)
    assert (grade.score, grade.status) == (0.0, "no_answer")
    assert CHECK.grade_turns(NUMBERS, turns[:2], truncated=True).status == "too_long"
    partial = CountdownCheckTask(partial_credit=True)
    assert partial.grade_turns(NUMBERS, [Turn("3 * 4 = 12 , 9 - 7 =")], truncated=True).score == 0.0


def test_the_price_and_the_answer_are_settings():
    task = CountdownCheckTask(check_cost=0.1, checks=1, partial_credit=True)
    turns = game(task, NUMBERS, "3 * 4 =", "3 * 4 = 12 , 9 - 7 = 2 , 12 + 2 = 14")
    assert turns[0].reply.reward == -0.1
    assert task.grade_turns(NUMBERS, turns, truncated=False).score == pytest.approx(0.5)
    assert "up to 1 times, each for 0.1" in task.instruction(NUMBERS)


def test_what_a_critic_is_told_of_a_hand():
    first, moved, no_move = BLACKJACK.critic_observation(HAND, (), ["", "+", "7"])
    hand = (16 / 21, 0, 9 / 10)  # total, soft, dealer
    assert first == pytest.approx((*hand, 0, 0, 0, 0, 0))
    assert moved == pytest.approx((*hand, 1, 0, 0, 0, 0))
    assert no_move == pytest.approx((*hand, 0, 0, 0, 1, 0))
    turns = (Turn("+", Reply("2 ; 18 , 0 -> 9")),)
    later, doubled = BLACKJACK.critic_observation(HAND, turns, ["", "*"])
    assert later == pytest.approx((18 / 21, 0, 9 / 10, 0, 0, 0, 0, 1 / 18))
    assert doubled == pytest.approx((18 / 21, 0, 9 / 10, 0, 0, 1, 0, 1 / 18))


def test_what_a_critic_is_told_of_a_code():
    # The opening leaves the numbers 1, 2 and 6; 1 1 2 is right in two places. Of the six codes that
    # are left four begin with 1, and one, 1 2 2, with 1 2.
    turns = (Turn("1 1 2", Reply("2 , 0")),)
    start, one, two = MASTERMIND.critic_observation(CODE, turns, ["", "1", "1 2"])
    left = math.log(6) / math.log(216)
    assert start == pytest.approx((1 / 6, left, 0, 0, 1))
    assert one == pytest.approx((1 / 6, left, 1 / 3, 1 / 3, 4 / 6))
    assert two == pytest.approx((1 / 6, left, 2 / 3, 2 / 3, 1 / 6))
    first = MASTERMIND.critic_observation(CODE, (), [""])[0]
    assert first[:2] == pytest.approx((0, math.log(27) / math.log(216)))


@pytest.mark.parametrize("name", GAMES)
def test_a_critic_is_told_of_every_sampled_token_over_the_turns(name):
    env = TokenEnv(name, critic_observation="state")
    rng = np.random.default_rng(0)
    turns = env.task.demonstration(env.task.problem(0), rng)
    tokens, replies = [], []
    for turn in turns:
        tokens += [VOCABULARY[word] for word in turn.completion.split()] + [EOS_ID]
        if len(replies) < len(turns) - 1:
            ids = env.tokenizer.encode(turn.reply.text, add_special_tokens=False)
            replies.append(EnvReply(len(tokens), tuple(ids), turn.reply))
    numbers = env.critic_observations(0, tokens, replies)
    assert numbers.shape == (len(tokens), len(env.task.critic_numbers))
    start = replies[-1].at if replies else 0
    text = env.task.critic_observation(env.task.problem(0), turns[: len(replies)], [""])
    assert numbers[start].tolist() == pytest.approx(text[0])
