"""Environments over rows, on the real packages: what they say is what they say without us."""

import json
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distrl_envs import Draws, Reply, TokenEnv, Turn
from distrl_envs.task import TaskError
from distrl_envs.tasks import make_task
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer
from tests.envs.test_text_envs import play


class TestSkyRL:
    HIGHER = "skyrl_gym:tests.envs.skyrl_env:tests/Higher"

    @pytest.fixture(autouse=True)
    def package(self):
        self.skyrl_gym = pytest.importorskip("skyrl_gym")

    @pytest.fixture
    def data(self, tmp_path):
        lines = []
        for number in range(20):
            chat = [
                {"role": "system", "content": "Count."},
                {"role": "user", "content": f"Q{number}"},
            ]
            gold = {"ground_truth": str(number), "method": "rule"}
            lines.append({"prompt": chat, "reward_spec": gold, "extra_info": {"index": number}})
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return {"data": str(path), "holdout": 0.0}

    def test_an_episode_is_that_of_the_library_itself(self, data):
        task = make_task("skyrl_gym:gsm8k_multi_turn", **data)
        row = json.loads(Path(data["data"]).read_text().splitlines()[7])
        env = self.skyrl_gym.make("gsm8k_multi_turn", env_config=None, extras=row)
        assert task.max_turns == env.max_turns == 5
        actions = ["So #### 6", "I do not know", "#### 7"]
        problem, turns = play(task, 7, actions)
        assert [*task.context(problem), {"role": "user", "content": problem.prompt}] == row[
            "prompt"
        ]
        for action, turn in zip(actions[:2], turns[:2], strict=True):
            step = env.step(action)
            text = step["observations"][0]["content"]
            assert turn.reply == Reply(text, reward=step["reward"]) and not step["done"]
        assert [turn.reply.reward for turn in turns] == [0.2 / 5, 0.0, 1.0]
        assert turns[2].reply == Reply(reward=1.0, over=True)
        grade = task.grade_turns(problem, turns, truncated=False)
        assert (grade.score, grade.status) == (0.0, "correct")
        # A turn without a reply is scored as a step.
        grade = task.grade_turns(problem, [turns[0], Turn("#### 9")], truncated=True)
        assert (grade.score, grade.status) == (0.2 / 5, "too_long")
        told = make_task("skyrl_gym:gsm8k_multi_turn", max_turns=2, **data)
        assert play(told, 7, ["#### 6", "#### 0"])[1][1].reply == Reply(reward=0.1, over=True)

    def test_an_episode_of_one_turn_is_scored_at_its_end(self, data):
        task = make_task("skyrl_gym:gsm8k", **data)
        assert task.max_turns == 1
        env = TokenEnv(task, tokenizer=byte_tokenizer(chat_template=CHAT))
        _, info = env.reset(options={"row": 3})
        for token in [*env.tokenizer.encode("#### 3"), env.eos_token_id]:
            *_, reward, over, _, info = env.step(token)
        assert over and reward == 1.0 and info["grade"].status == "correct"
        assert task.grade(task.problem(3), "#### 4").status == "wrong"

    def test_chance_is_the_rows_and_the_configuration_the_environments(self, data):
        task = make_task(self.HIGHER, env_kwargs={"cost": 0.25}, **data)
        state = random.getstate()
        problem, turns = play(task, 5, ["3", "9"])
        assert random.getstate() == state
        copied = pickle.loads(pickle.dumps(task))
        random.seed(5)
        assert play(copied, 5, ["3", "9"]) == (problem, turns)
        texts = [turn.reply.text for turn in turns]
        assert texts[0].startswith("higher ") and texts[0].endswith("\n\n2")  # two messages
        assert texts[1].startswith("lower ") and turns[0].reply.reward == -0.25
        assert play(task, 6, ["3"])[1][0].reply.text != texts[0]
        # Another message before, and the reply is an error, not noise.
        with pytest.raises(TaskError, match="row 5, turn 1, it said 'lower"):
            task.respond(problem, [Turn("3", turns[1].reply), Turn("4")], Draws(b""))

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            ("chance", "not the same when it is played again"),
            ("init", "writes its prompts itself.*Hello"),
            ("rewrites", "rewrites what the model has written.*Set stop"),
            ("service", "SearchToolGroup.*over the network"),
        ],
    )
    def test_what_cannot_be_played_again_is_an_error(self, data, fault, said):
        with pytest.raises((ValueError, TaskError), match=f"(?s){said}"):
            play(make_task(self.HIGHER, env_kwargs={"cost": 0, "fault": fault}, **data), 5, "37")

    @pytest.mark.parametrize(
        ("name", "config", "said"),
        [
            ("search", {}, "'search' cannot be used.*over the network"),
            ("searchcode", {}, "without a sandbox"),
            ("text2sql", {}, "order of a Python set"),
            ("lcb", {}, 'Code-v0 with format = "livecodebench"'),
            ("nothing", {}, "cannot make the environment 'nothing' for row 0"),
            ("no_module:x", {}, "could not be imported.*no_module"),
            ("aime", {}, "reward_model field is required"),
            ("gsm8k", {"max_turns": 0}, "max_turns=0.*at least 1"),
            ("gsm8k", {"fields": {"problem": "question"}}, "field 'question' is missing"),
            ("gsm8k", {"depth": 2}, "does not take.*depth"),
        ],
    )
    def test_what_cannot_be_played_is_refused_by_name(self, data, name, config, said):
        with pytest.raises(ValueError, match=f"(?s){said}"):
            make_task(f"skyrl_gym:{name}", **data, **config)

    def test_a_row_of_another_environment_is_a_fault(self, tmp_path):
        path = tmp_path / "other.jsonl"
        path.write_text(json.dumps({"prompt": "Q", "env_class": "aime", "reward_spec": {}}))
        with pytest.raises(ValueError, match=r"other\.jsonl:1.*'aime'; this task plays 'gsm8k'"):
            make_task("skyrl_gym:gsm8k", data=str(path))


@pytest.mark.slow  # Its package takes long to import, and comes with the extra `dev` alone.
class TestVerifiers:
    ENV = "verifiers:tests.envs.verifiers_env"

    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("verifiers")

    def test_an_episode_is_a_rollout_of_the_library(self):
        make_task(self.ENV)  # What it imports for the first time may draw.
        state, signals = random.getstate(), [signal.getsignal(s) for s in (2, 15)]
        task = make_task(self.ENV)
        assert task.max_turns == 4 and task.correct_from == 0.5
        secrets = [int(task.problem(row).data["answer"]) for row in range(len(task))]
        row = next(row for row, secret in enumerate(secrets) if 3 < secret < 30)
        problem, turns = play(task, row, ["3", "30", f"{secrets[row]} "])
        assert random.getstate() == state
        assert [signal.getsignal(s) for s in (2, 15)] == signals
        assert task.context(problem) == [{"role": "system", "content": "Be brief."}]
        replies = [turn.reply for turn in turns]
        assert [reply.text.split(",")[0] for reply in replies] == ["higher", "lower", ""]
        assert [reply.over for reply in replies] == [False, False, True]
        # 1 for the number and twice -.125 for each turn but the first.
        grade = task.grade_turns(problem, turns, truncated=False)
        assert (grade.score, grade.status) == (0.5, "correct")
        grade = task.grade_turns(problem, [*turns[:2], Turn("2")], truncated=True)
        assert (grade.score, grade.status) == (-0.5, "too_long")
        _, lost = play(task, row, ["3", "30", "3", "3"])  # the environment's own last turn
        assert [turn.reply.over for turn in lost] == [False, False, False, True]
        assert lost[0] == turns[0] and lost[2].reply.text != turns[0].reply.text

    def test_replies_depend_on_the_arguments_alone(self):
        task = make_task(self.ENV)
        problem, turns = play(task, 3, ["5", "8"])
        asked = [turns[0], Turn("8")]
        play(task, 4, ["1", "2"])  # another episode between
        copied = pickle.loads(pickle.dumps(task))
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(copied.respond(problem, asked, Draws(b"else")))
        )
        thread.start()
        thread.join()
        assert answers == [turns[1].reply]
        code = (
            "from distrl_envs.tasks import make_task; from tests.envs.test_text_envs import play;"
            f"print(play(make_task({self.ENV!r}), 3, ['5', '8'])[1][1].reply.text)"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.stdout.splitlines()[-1:] == [turns[1].reply.text], other.stderr

    def test_one_turn_and_groups_of_environments(self):
        task = make_task(self.ENV, env_kwargs={"kind": "single"})
        assert task.max_turns == 1
        problem = task.problem(1)
        assert task.grade(problem, problem.data["answer"]).status == "correct"
        assert task.grade(problem, "-1", truncated=True).status == "too_long"
        task = make_task(self.ENV, env_kwargs={"kind": "group", "held_out": True}, holdout=0.0)
        assert len(task) == 40 + 1 - 4  # four stand in the environment's eval_dataset
        assert play(task, len(task) - 1, ["5"])[1][0].reply.over
        assert task.grade(task.problem(len(task) - 1), "5").score == 1.0
        test = make_task(self.ENV, env_kwargs={"held_out": True}, split="test")
        answers = [test.problem(row).data["answer"] for row in range(len(test))]
        assert answers == ["0", "7", "14", "21"]

    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [
            ({"kind": "tools"}, "its ToolEnv has tools.*Tools-v0"),
            ({"kind": "judge"}, "JudgeRubric asks a judge model over an API"),
            ({"kind": "single", "fault": "group"}, "compare the rollouts of a group"),
            ({"kind": "single", "fault": "number"}, "count 0 there: no_number.*'much'"),
            ({"kind": "single", "fault": "raises"}, "raises: KeyError: 'nothing there'"),
            ({"fault": "uuid"}, "row 1, turn 1, it said"),
            ({"fault": "error"}, "InfraError: no more numbers"),
            ({"fault": "role"}, "a message of 'system'"),
            ({"fault": "rewrites"}, "changes what the model has read"),
            ({"fault": "turns"}, "rewards single turns"),
            ({"depth": 3}, "cannot load.*depth"),
        ],
    )
    def test_what_cannot_be_carried_over_is_refused_by_name(self, kwargs, said):
        with pytest.raises((ValueError, TaskError), match=f"(?s){said}"):
            task = make_task(self.ENV, env_kwargs=kwargs)
            task.grade(task.problem(1), "5")
            play(task, 1, ["3", "4"])

    def test_an_unknown_environment_is_refused(self):
        with pytest.raises(ValueError, match="cannot load 'no-such-env'"):
            make_task("verifiers:no-such-env")
