import pickle
import time
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from distrl_envs import OBS_MODES, Grade, Problem, Task, TokenEnv
from distrl_envs.tasks.countdown import CountdownTask
from distrl_envs.tokenizers import small_tokenizer
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer

IDS = {
    "distrl/Countdown-v0": "countdown",
    "distrl/Arithmetic-v0": "arithmetic",
    "distrl/GraphPath-v0": "graph_path",
    "distrl/Sums-v0": "sums",
    "distrl/Blackjack-v0": "blackjack",
    "distrl/Mastermind-v0": "mastermind",
    "distrl/CountdownCheck-v0": "countdown_check",
}
GAMES = ("blackjack", "mastermind", "countdown_check")
SMALL = small_tokenizer()
EOS = SMALL.eos_token_id


class OneProblem(Task):
    """`3 4 7 9 -> 24 :` for ever, graded by Countdown; each token may earn a little."""

    name = "one"
    max_prompt_tokens = 8
    max_completion_tokens = 20

    def __init__(self, step_reward=None):
        self.has_step_reward = step_reward is not None
        self._reward = step_reward

    def __len__(self):
        return 1

    def problem(self, row):
        self.check_row(row)
        data = {"numbers": (3, 4, 7, 9), "target": 24}
        return Problem(row, "3 4 7 9 -> 24 :", data, "3 4 7 9|24")

    def grade(self, problem, completion, *, truncated=False):
        return CountdownTask().grade(problem, completion, truncated=truncated)

    def step_reward(self, problem, completion_ids):
        return self._reward * completion_ids[-1] + len(completion_ids)

    def tokenizer(self):
        return SMALL


def play(env, text, end=True):
    """Rewards, flags and infos of writing a text (and EOS)."""
    env.reset()
    return [env.step(token) for token in SMALL.encode(text) + [EOS] * end]


SOLVED = "3 * 4 = 12 , 9 - 7 = 2 , 12 * 2 = 24"


@pytest.mark.parametrize("obs_mode", OBS_MODES)
@pytest.mark.parametrize("env_id", IDS)
def test_check_env(env_id, obs_mode):
    env = gymnasium.make(f"distrl_envs:{env_id}", obs_mode=obs_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert env.unwrapped.task.name == IDS[env_id]
    assert env is env.unwrapped, "wrappers cost more per token than the environment"


@pytest.mark.parametrize(
    ("text", "end", "reward", "reason", "status"),
    [
        (SOLVED, True, 1.0, "stop", "correct"),
        ("9 - 7 = 2 , 4 * 3 = 12 , 2 * 12 = 24", True, 1.0, "stop", "correct"),
        (SOLVED + " , , ,", False, 0.0, "length", "too_long"),
        ("3 * 4 = 12", True, 0.0, "stop", "wrong"),
        ("", True, 0.0, "stop", "no_answer"),
        (", " * 19, True, 0.0, "stop", "no_answer"),
        (", " * 20, False, 0.0, "length", "too_long"),
        (SOLVED + " <pad>", True, 0.0, "stop", "wrong"),
    ],
)
def test_reward_table(text, end, reward, reason, status):
    steps = play(TokenEnv(OneProblem(), max_completion_tokens=20), text, end)
    assert [step[1] for step in steps[:-1]] == [0.0] * (len(steps) - 1)
    assert [step[2] for step in steps[:-1]] == [False] * (len(steps) - 1)
    assert all(step[4] == {} for step in steps[:-1])
    _, got, terminated, truncated, info = steps[-1]
    assert (got, terminated, truncated) == (reward, True, False)
    assert info["finish_reason"] == reason
    assert info["grade"].status == status
    assert info["completion"] == " ".join(text.split())


def test_an_answer_that_fills_the_limit_counts_as_it_stands():
    """17 tokens without EOS: ended by the limit, correct, and terminated."""
    env = TokenEnv(OneProblem(), max_completion_tokens=17)
    _, reward, terminated, truncated, info = play(env, SOLVED, end=False)[-1]
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["finish_reason"], info["grade"].status) == ("length", "correct")


def test_eos_as_the_last_token_allowed_is_a_stop():
    env = TokenEnv(OneProblem(), max_completion_tokens=18)
    steps = play(env, SOLVED)
    assert len(steps) == 18
    assert steps[-1][4]["finish_reason"] == "stop"


def test_any_of_several_eos_tokens_ends():
    env = TokenEnv(OneProblem(), eos_token_ids=[EOS, 0])
    env.reset()
    env.step(6)
    _, _, terminated, _, info = env.step(0)
    assert terminated and info["finish_reason"] == "stop" and info["completion"] == "3"


def test_grading_beforehand_changes_nothing():
    texts = [SOLVED, "3 + 4 = 7", "= 24 ="]
    completions = [[*SMALL.encode(texts[0]), EOS], [*SMALL.encode(texts[1]), EOS],
                   (SMALL.encode(texts[2]) * 10)[:20]]  # fmt: skip
    env = TokenEnv(OneProblem(step_reward=0.25))
    verdicts = env.grade_many([0, 0, 0], completions)
    assert [verdict.grade.status for verdict in verdicts] == ["correct", "wrong", "too_long"]
    for completion, verdict in zip(completions, verdicts, strict=True):
        played = []
        for options in ({"row": 0}, {"row": 0, "verdict": verdict}):
            env.reset(options=options)
            played.append([env.step(token) for token in completion])
        assert played[0] == played[1]
        assert played[1][-1][-1]["grade"] is verdict.grade
    env.reset(options={"row": 0})
    assert env.step(EOS)[-1]["completion"] == ""  # A verdict is for one episode.


def test_step_rewards_are_added_to_the_score():
    env = TokenEnv(OneProblem(step_reward=0.5))
    rewards = [step[1] for step in play(env, "3 4")]
    assert rewards == [0.5 * 6 + 1, 0.5 * 7 + 2, 0.5 * 1 + 3 + 0.0]
    assert play(env, SOLVED)[-1][1] == 0.5 * EOS + 18 + 1.0


def test_observations_by_hand():
    prompt = [6, 7, 10, 12, 108, 27, 109]  # 3 4 7 9 -> 24 :
    token = TokenEnv(OneProblem())
    observation, info = token.reset()
    assert (observation, info["prompt_ids"], info["row"]) == (109, prompt, 0)
    assert info["problem"].key == "3 4 7 9|24"
    assert [token.step(a)[0] for a in (6, 105, EOS)] == [6, 105, EOS]

    incremental = TokenEnv(OneProblem(), obs_mode="incremental")
    assert incremental.reset()[0].tolist() == [7, *prompt, 0]
    assert incremental.step(6)[0].tolist() == [1, 6, 0, 0, 0, 0, 0, 0, 0]
    assert incremental.step(EOS)[0].tolist() == [1, EOS, 0, 0, 0, 0, 0, 0, 0]

    context = TokenEnv(OneProblem(), obs_mode="context", max_completion_tokens=3)
    assert context.reset()[0].tolist() == [7, *prompt, 0, 0, 0, 0]
    first, _, _, _, _ = context.step(6)
    assert first.tolist() == [8, *prompt, 6, 0, 0, 0]
    assert context.step(105)[0].tolist() == [9, *prompt, 6, 105, 0, 0]
    assert first.tolist() == [8, *prompt, 6, 0, 0, 0], "observations are not overwritten"
    assert context.step(EOS)[0].tolist() == [10, *prompt, 6, 105, EOS, 0]


@pytest.mark.parametrize("obs_mode", OBS_MODES)
def test_observations_are_in_their_space_at_both_limits(obs_mode):
    env = TokenEnv(OneProblem(), obs_mode=obs_mode, max_prompt_tokens=7, max_completion_tokens=2)
    assert env.reset()[0] in env.observation_space
    for token in (110, 110):
        assert env.step(token)[0] in env.observation_space


def test_rows_decide_the_problem_and_seeds_decide_the_rows():
    one, other = TokenEnv(), TokenEnv()
    for row in (0, 5, 5, 2**31 - 2, 0):
        first, second = (env.reset(options={"row": row})[1] for env in (one, other))
        assert first == second and first["row"] == row
        assert first["problem"] == one.task.problem(row)
    one.reset(seed=3)
    other.reset(seed=3)
    rows = [env.reset()[1]["row"] for env in (one, other) for _ in range(5)]
    assert rows[:5] == rows[5:] and len(set(rows)) == 5
    other.reset(seed=4)
    assert other.reset()[1]["row"] != rows[0]


def test_what_a_caller_does_to_prompt_ids_stays_with_the_caller():
    env = TokenEnv(obs_mode="context")
    info = env.reset(options={"row": 1})[1]
    kept = list(info["prompt_ids"])
    info["prompt_ids"].append(0)
    assert env.reset(options={"row": 1})[1]["prompt_ids"] == kept
    assert env.step(6)[0].tolist()[: len(kept) + 2] == [len(kept) + 1, *kept, 6]


def test_split_seed_and_task_config_reach_the_task():
    env = TokenEnv("countdown", split="test", seed=7, task_config={"numbers": 3})
    expected = CountdownTask(split="test", seed=7, numbers=3)
    assert env.task.problem(4) == expected.problem(4)
    assert (env.max_prompt_tokens, env.max_completion_tokens) == (6, 12)


@pytest.mark.parametrize("name", [name for name in IDS.values() if name not in GAMES])
def test_the_default_limits_hold_every_prompt_and_solution(name):
    env = TokenEnv(name)
    rng = np.random.default_rng(0)
    longest = 0
    for _ in range(300):
        problem, solution = env.task.sample_solved(rng)
        assert len(env.prompt_ids(problem)) <= env.max_prompt_tokens
        longest = max(longest, len(SMALL.encode(solution)) + 1)
    assert longest <= env.max_completion_tokens
    assert longest >= env.max_completion_tokens - 2


def test_another_tokenizer_gets_the_instruction_and_may_answer_in_its_own_form():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    env = TokenEnv(OneProblem(), tokenizer=tokenizer, system_prompt="Think.")
    assert (env.max_prompt_tokens, env.max_completion_tokens) == (512, 512)
    countdown = TokenEnv("countdown", tokenizer=tokenizer, system_prompt="Think.")
    problem = countdown.task.problem(0)
    prompt = tokenizer.decode(countdown.reset(options={"row": 0})[1]["prompt_ids"])
    assert prompt == f"[system]Think.[user]{countdown.task.instruction(problem)}[assistant]"
    env.reset()
    answer = "Well: <answer>3 × 4 = 12\n9 - 7 = 2\n12 × 2 = 24</answer>"
    for token in tokenizer.encode(answer):
        env.step(token)
    _, reward, _, _, info = env.step(tokenizer.eos_token_id)
    assert reward == 1.0 and info["completion"] == answer


def test_ids_of_a_padded_vocabulary_are_actions_that_spoil_an_answer():
    env = TokenEnv(OneProblem(), vocab_size=128)
    assert env.action_space.n == 128
    env.reset()
    for token in [*SMALL.encode(SOLVED), 127]:
        env.step(token)
    assert env.step(EOS)[1] == 0.0


@pytest.mark.parametrize("obs_mode", OBS_MODES)
def test_a_copy_by_pickle_continues_where_the_original_stands(obs_mode):
    env = TokenEnv("graph_path", obs_mode=obs_mode)
    env.reset(seed=1)
    env.step(6)
    copy = pickle.loads(pickle.dumps(env))
    for action in (7, EOS):
        mine, theirs = env.step(action), copy.step(action)
        assert np.array_equal(mine[0], theirs[0]) and mine[1:] == theirs[1:]
    assert env.reset()[1] == copy.reset()[1]


def test_many_environments_share_one_tokenizer():
    assert TokenEnv().tokenizer is TokenEnv("arithmetic").tokenizer


def test_a_step_costs_no_more_late_in_an_episode():
    """Constant work per token: 50 times further on it may take 5 times as long, for noise."""
    env = TokenEnv(max_completion_tokens=200_000)
    env.reset()

    def seconds(steps):
        start = time.perf_counter()
        for _ in range(steps):
            env.step(6)
        return time.perf_counter() - start

    early = min(seconds(500) for _ in range(5))
    seconds(100_000)
    late = min(seconds(500) for _ in range(5))
    assert late < 5 * early


def test_stock_gymnasium_vectors():
    env = gymnasium.make_vec(
        "distrl_envs:distrl/Countdown-v0", num_envs=2, vectorization_mode="sync"
    )
    observations, infos = env.reset(seed=0)
    assert observations.tolist() == [109, 109] and len(infos["prompt_ids"]) == 2
    _, rewards, terminated, truncated, infos = env.step(np.array([EOS, 6]))
    assert rewards.tolist() == [0.0, 0.0]
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, False]
    assert isinstance(infos["grade"][0], Grade)


def test_a_prompt_is_rendered_once_however_often_it_is_served(monkeypatch):
    env, rendered = TokenEnv("countdown"), []
    render = env.prompts.ids
    monkeypatch.setattr(
        env.prompts, "ids", lambda problem: rendered.append(problem.row) or render(problem)
    )
    first = [env.reset(options={"row": row})[1]["prompt_ids"] for row in (0, 1)]
    again = [env.reset(options={"row": row})[1]["prompt_ids"] for row in (0, 1)]
    assert rendered == [0, 1]
    assert first == again
    again[0].clear()  # the env's own copy stays whole
    assert env.reset(options={"row": 0})[1]["prompt_ids"] == first[0]


def test_a_completion_ends_with_the_token_that_completes_a_stop_string():
    tokenizer = byte_tokenizer()
    env = TokenEnv(OneProblem(), tokenizer=tokenizer, stop=["</a>", "\N{GREEK SMALL LETTER PI}r"])
    for text, kept in (("1 </b></a> 2", "1 </b></a>"), ("\u03c0 \u03c0r2", "\u03c0 \u03c0r")):
        ids = tokenizer.encode(text)
        assert env.length_until_stop(ids) == len(kept.encode())
        env.reset(seed=0)
        played = 0
        for token in ids:
            *_, terminated, _, info = env.step(token)
            played += 1
            if terminated:
                break
        assert played == len(kept.encode())
        assert (info["finish_reason"], info["completion"]) == ("stop", kept)
    assert env.length_until_stop(tokenizer.encode("</a")) == 3


@pytest.mark.parametrize("stop", ["</a>", [""], [3]])
def test_stop_strings_are_a_list_of_texts(stop):
    with pytest.raises(ValueError, match="it must be a list of texts"):
        TokenEnv(OneProblem(), stop=stop)
