"""Environments of others as tasks: what they say is what they say when stepped without us."""

import pickle
import random
import string
import warnings

import gymnasium
import pytest
from gymnasium.spaces import Box, Discrete, Text
from gymnasium.utils.env_checker import check_env

from distrl_envs import OBS_MODES, Draws, Reply, TokenEnv, Turn
from distrl_envs.task import TaskError, split_of
from distrl_envs.tasks import make_task
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer

WORDS = string.ascii_letters + string.digits + " .:<>?"


class Higher(gymnasium.Env):
    """Guess a number of 0..99; each guess costs .25, and each reply names a die too."""

    observation_space = Text(60, charset=WORDS)
    action_space = Text(2, charset=string.digits)

    def __init__(self, cost=0.25, fault=""):
        self.cost, self.fault = cost, fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.secret = int(self.np_random.integers(100))
        chance = random.random() if self.fault == "start" else self.np_random.random()
        return f"The number is {'even' if self.secret % 2 else 'odd'}. {int(1e9 * chance)}", {}

    def step(self, action):
        guess = int(action)
        if self.fault == "dies":
            raise OSError("no more numbers")
        die = random.random() if self.fault == "step" else self.np_random.random()
        info = {"is_success": guess == self.secret, "score": 0.5 * (guess == self.secret)}
        if self.fault == "bytes":
            return b"no", 0.0, False, False, info
        told = "higher" if guess < self.secret else "lower"
        return f"{told} {int(1e6 * die)}", -self.cost, guess == self.secret, False, info


class Small(gymnasium.Env):
    """Add two digits, as words of the small tokenizer; the return decides what is right."""

    observation_space = Text(9, charset=string.digits + " +")
    action_space = Text(2, charset=string.digits)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.digits = self.np_random.integers(10, size=2)
        return "{} + {}".format(*self.digits), {}

    def step(self, action):
        right = int(action) == self.digits.sum()
        return "100 1" if action == "0" else "0", float(right), bool(right), False, {}


class Numbers(Small):
    action_space = Discrete(3)


class Picture(Small):
    observation_space = Box(0, 1, (2,))


for made, limit in ((Higher, 5), (Small, None), (Numbers, None), (Picture, None)):
    gymnasium.register(
        f"distrl_test/{made.__name__}-v0", made, max_episode_steps=limit, disable_env_checker=True
    )

HIGHER = "gym:distrl_test/Higher-v0"
SMALL = "gym:distrl_test/Small-v0"


def play(task, row, completions):
    """The problem of a row, and its turns."""
    problem, turns = task.problem(row), []
    for number, completion in enumerate(completions):
        turns.append(Turn(completion))
        reply = task.respond(problem, turns, Draws(bytes([number])))
        turns[-1] = Turn(completion, reply)
    return problem, turns


@pytest.mark.parametrize("row", [0, 7, 123_456_789])
def test_an_episode_is_that_of_the_environment_itself(row):
    task = make_task(HIGHER, env_kwargs={"cost": 0.125})
    problem, turns = play(
        task, row, ["50", "so <action> 7 </action>", "<action>1</action> <action>99"]
    )
    env = gymnasium.make("distrl_test/Higher-v0", cost=0.125)
    first, _ = env.reset(seed=problem.data["seed"])
    assert problem.prompt == first
    for action, turn in zip(["50", "7", "99"], turns, strict=True):
        text, reward, terminated, truncated, _ = env.step(action)
        assert not (terminated or truncated)
        assert turn.reply == Reply(text, reward=reward, status="ok")
        assert reward == -0.125


def test_replies_depend_on_the_arguments_alone():
    task, other = make_task(HIGHER), pickle.loads(pickle.dumps(make_task(HIGHER)))
    problem, turns = play(task, 3, ["50", "20"])
    asked = [Turn("50", turns[0].reply), Turn("20")]
    play(task, 4, ["1", "2", "3"])  # another episode between, in the same environment
    for one in (task, other, make_task(HIGHER)):
        assert one.problem(3) == problem
        assert one.respond(problem, asked, Draws(b"else")) == turns[1].reply
    others = play(task, 3, ["51", "20"])[1]
    assert others[1].reply == turns[1].reply  # the same die: chance is the row's


def test_rows_are_seeds_and_splits_share_none():
    seeds = {}
    for split in ("train", "validation", "test"):
        task = make_task(HIGHER, split=split)
        problems = [task.problem(row) for row in range(40)]
        assert {split_of(problem.key) for problem in problems} == {split}
        seeds[split] = {problem.data["seed"] for problem in problems}
        assert len(seeds[split]) == 40
        assert len({problem.prompt for problem in problems}) == 40
    assert not seeds["train"] & seeds["validation"] and not seeds["train"] & seeds["test"]
    assert make_task(HIGHER, seed=1).problem(0) != make_task(HIGHER).problem(0)


def test_scores_and_statuses_are_those_that_the_environment_names():
    task = make_task(HIGHER)
    env = gymnasium.make("distrl_test/Higher-v0")
    problem = task.problem(0)
    env.reset(seed=problem.data["seed"])
    secret = str(env.unwrapped.secret)
    wrong = str((int(secret) + 1) % 100)
    _, turns = play(task, 0, [wrong, secret])
    assert turns[1].reply.over and not turns[0].reply.over
    assert [turn.reply.reward for turn in turns] == [-0.25, -0.25]
    grade = task.grade_turns(problem, turns, truncated=False)
    assert (grade.score, grade.status) == (0.5, "correct")
    grade = task.grade_turns(problem, turns[:1], truncated=False)
    assert (grade.score, grade.status) == (0.0, "wrong")
    grade = task.grade_turns(problem, [turns[0], Turn(secret)], truncated=True)
    assert (grade.score, grade.status) == (0.0, "too_long")  # a cut turn is not played
    assert task.grade(problem, secret).score == 0.5
    _, turns = play(task, 0, [wrong] * 5)  # the fifth is the last step that is registered
    assert [turn.reply.over for turn in turns] == [False] * 4 + [True]
    assert task.max_turns == 5


def test_without_a_word_on_success_the_return_decides():
    task = make_task(SMALL, compact=True)
    problem = task.problem(0)
    right = str(sum(map(int, problem.prompt.split()[:3:2])))
    grade = task.grade(problem, right)
    assert (grade.score, grade.status) == (0.0, "correct")
    assert task.grade(problem, "99").status == "wrong"
    assert make_task(SMALL, compact=True, correct_from=1.5).grade(problem, right).status == "wrong"


@pytest.mark.parametrize("completion", ["", "100", "-1", "I say 5", "<action>five</action>"])
def test_an_invalid_action_is_marked_spent_and_not_given_to_the_environment(completion):
    task = make_task(HIGHER, invalid_penalty=0.75)
    problem, turns = play(task, 0, ["50", completion, "20"])
    reply = turns[1].reply
    assert reply.status == "invalid_action" and reply.reward == -0.75 and not reply.over
    assert reply.text == (
        "[invalid action] It must be a text of 1 to 2 of the characters '0123456789'."
    )
    assert turns[2].reply == play(task, 0, ["50", "20"])[1][1].reply
    assert task.grade_turns(problem, turns, truncated=False).status == "wrong"
    assert make_task(HIGHER).respond(problem, [Turn(completion)], Draws(b"")).reward == -0.1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("start", "start, it said"),
        ("step", "turn 1, it said"),
        ("dies", "OSError: no more numbers"),
        ("bytes", "its space is Text, so it must be a str"),
    ],
)
def test_an_environment_that_cannot_be_played_again_or_fails_is_an_error(fault, said):
    tokenizer = byte_tokenizer(chat_template=CHAT)
    with pytest.raises(TaskError, match=said):
        env = TokenEnv(HIGHER, tokenizer=tokenizer, task_config={"env_kwargs": {"fault": fault}})
        env.reset(options={"row": 0})
        for token in [*tokenizer.encode("50"), env.eos_token_id] * 2:
            env.step(token)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gym:distrl_test/Numbers-v0", {}, r"action space Discrete\(3\).*takes Text"),
        ("gym:distrl_test/Picture-v0", {}, r"observation space Box.*takes Text"),
        ("gym:Nowhere-v0", {}, r"cannot make the environment 'Nowhere-v0'.*my_module:ID"),
        ("gym:no_module_here:Env-v0", {}, "cannot make.*no_module_here"),
        (HIGHER, {"env_kwargs": {"price": 1}}, "does not take.*price"),
        (HIGHER, {"split": "all"}, "split 'all'"),
        (HIGHER, {"max_turns": 1}, "max_turns=1.*at least 2"),
        (HIGHER, {"invalid_penalty": -1}, "invalid_penalty=-1"),
        (HIGHER, {"instruction": "Guess!"}, "{observation}"),
        (
            HIGHER,
            {"compact": True},
            "observation space.*has the characters '.<[?]ABC.*Leave compact",
        ),
        (HIGHER, {"depth": 2}, "does not take.*depth"),
    ],
)
def test_what_cannot_be_played_is_refused_by_name(name, config, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        make_task(name, **config)


def test_without_a_tokenizer_the_small_one_is_for_those_who_ask():
    with pytest.raises(ValueError, match=r"no tokenizer of its own.*compact = true"):
        TokenEnv(HIGHER)
    env = TokenEnv(SMALL, task_config={"compact": True}, obs_mode="incremental")
    _, info = env.reset(options={"row": 0})
    shown = env.tokenizer.convert_ids_to_tokens(info["prompt_ids"])
    assert shown[1] == "+" and shown[3:] == [":"]
    for word in ("99", "<eos>"):
        *_, info = env.step(env.tokenizer.convert_tokens_to_ids(word))
    assert env.tokenizer.convert_ids_to_tokens(info["reply_ids"]) == ["0", ":"]
    for word in ("1", "+", "<eos>"):
        *_, info = env.step(env.tokenizer.convert_tokens_to_ids(word))
    assert info["reply"].status == "invalid_action" and info["reply"].text == "-"
    with pytest.raises(TaskError, match=r"\['100'\] are none"):
        for word in ("0", "<eos>"):
            env.step(env.tokenizer.convert_tokens_to_ids(word))


@pytest.mark.parametrize("mode", OBS_MODES)
def test_a_token_environment_over_it_is_one_of_gymnasiums(mode):
    for name, config, tokenizer in (
        (HIGHER, {}, byte_tokenizer(chat_template=CHAT)),
        (SMALL, {"compact": True}, None),
    ):
        env = TokenEnv(name, task_config=config, tokenizer=tokenizer, obs_mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env, skip_render_check=True)


def test_the_prompt_says_how_to_act_and_rewards_add_up():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    env = TokenEnv(HIGHER, tokenizer=tokenizer, max_turns=3)
    _, info = env.reset(options={"row": 5})
    prompt = tokenizer.decode(info["prompt_ids"])
    assert info["problem"].prompt in prompt
    assert prompt.endswith(
        "End each turn with your action between <action> and </action>: a text of 1 to 2 of the "
        "characters '0123456789'.[assistant]"
    )
    rewards, over = [], False
    for completion in ("<action>100</action>", "<action>101</action>", "none"):
        for token in [*tokenizer.encode(completion), env.eos_token_id]:
            _, reward, over, _, info = env.step(token)
            rewards.append(reward)
    assert over and info["finish_reason"] == "turns"
    assert sum(rewards) == pytest.approx(-0.3, abs=1e-12)
    assert info["grade"].status == "too_long"


class TestTextArena:
    """On the real package."""

    @pytest.fixture(autouse=True)
    def package(self):
        self.textarena = pytest.importorskip("textarena")

    def outcome(self, task, actions):
        problem, turns = play(task, 2, actions)
        return problem, turns, task.grade_turns(problem, turns, truncated=False)

    def test_a_game_is_that_of_the_library_itself(self):
        task = make_task("textarena:GuessTheNumber-v0")
        problem = task.problem(2)
        game = self.textarena.make("GuessTheNumber-v0-raw")
        state = random.getstate()
        game.reset(num_players=1, seed=problem.data["seed"])
        random.setstate(state)
        secret = game.game_number
        assert problem.prompt == game.get_observation()[1][0][1]
        wrong = secret % 20 + 1
        hint = "lower" if wrong > secret else "higher"
        _, turns, grade = self.outcome(
            task, ["no idea", f"<action>{wrong}</action>", f"[{secret}]"]
        )
        assert random.getstate() == state
        replies = [turn.reply for turn in turns]
        assert [reply.status for reply in replies] == ["invalid_action", "ok", "ok"]
        assert "You attempted an invalid move" in replies[0].text
        assert replies[1].text == f"The target number is {hint}."
        assert [reply.reward for reply in replies] == [-0.1, 0.0, 1.0]
        assert [reply.over for reply in replies] == [False, False, True]
        assert (grade.score, grade.status) == (0.0, "wrong")  # a return of .9
        assert self.outcome(task, [f"[{secret}]"])[2].status == "correct"

    def test_a_second_invalid_move_ends_the_game_at_its_own_reward(self):
        _, turns, grade = self.outcome(make_task("textarena:GuessTheNumber-v0"), ["no", "none"])
        assert turns[1].reply == Reply(
            turns[1].reply.text, reward=-0.1, over=True, status="invalid_action"
        )
        assert grade.status == "wrong"

    def test_a_game_that_confuses_reason_and_reward_ends_with_its_reward(self):
        task = make_task("textarena:Countdown-v0", invalid_penalty=0.0)
        _, turns, _ = self.outcome(task, ["no", "none"])
        game = self.textarena.make("Countdown-v0-raw")
        game.reset(num_players=1, seed=task.problem(2).data["seed"])
        assert turns[1].reply.over and turns[1].reply.status == "invalid_action"
        for _ in range(2):
            game.step("no")
        assert game.close()[1][0]["reason"] == f"Invalid Move: {turns[1].reply.reward}"

    @pytest.mark.parametrize("game", ["Bandit-v0", "Blackjack-v0", "FrozenLake-v0-random"])
    def test_chance_is_the_rows(self, game):
        move = {"Bandit-v0": "[red]", "Blackjack-v0": "[hit]", "FrozenLake-v0-random": "[right]"}
        one, two = (make_task(f"textarena:{game}") for _ in range(2))
        problem, turns = play(one, 0, [move[game]] * 3)
        random.seed(5)
        assert play(two, 0, [move[game]] * 3) == (problem, turns)

    def test_what_cannot_be_played_is_refused_by_name(self):
        with pytest.raises(ValueError, match="games for one player alone"):
            make_task("textarena:TicTacToe-v0")
        with pytest.raises(ValueError, match="cannot make the game 'Nothing-v0'"):
            make_task("textarena:Nothing-v0")

    def test_a_token_environment_plays_it(self):
        env = TokenEnv("textarena:GuessTheNumber-v0", tokenizer=byte_tokenizer(chat_template=CHAT),
                       max_prompt_tokens=2048)  # fmt: skip
        check_env(env, skip_render_check=True)
