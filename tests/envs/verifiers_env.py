"""Environments of verifiers that the tests load by the name of this module."""

import random
import uuid

import verifiers as vf
from datasets import Dataset

ROWS = {
    "question": [f"Guess my number, {i}." for i in range(40)],
    "answer": [str(7 * i % 40) for i in range(40)],
}
SYSTEM = "Be brief."


def exact(completion, answer):
    said = [message["content"] for message in completion if message["role"] == "assistant"]
    return float(said[-1].strip() == answer)


async def turns_cost(state):
    return -0.125 * (len(state["trajectory"]) - 1)


class Guess(vf.MultiTurnEnv):
    """Says where the number lies; a dice roll of the global generator stands beside it."""

    fault = ""

    async def setup_state(self, state):
        state["guesses"] = []
        return state

    @vf.stop
    async def found(self, state):
        return bool(state["guesses"]) and state["guesses"][-1] == state["answer"]

    async def env_response(self, messages, state, **kwargs):
        guess = messages[-1]["content"].strip()
        state["guesses"].append(guess)
        said = "higher" if int(guess) < int(state["answer"]) else "lower"
        if guess == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "found"}]
        if self.fault == "uuid":
            said = uuid.uuid4().hex
        if self.fault == "error":
            raise vf.InfraError("no more numbers")
        role = "system" if self.fault == "role" else "user"
        return [{"role": role, "content": f"{said}, {random.randrange(10**6)}"}]

    async def get_prompt_messages(self, state):
        prompt = await super().get_prompt_messages(state)
        return prompt[-1:] if self.fault == "rewrites" and state["trajectory"] else prompt

    async def add_trajectory_step(self, state, step):
        step["reward"] = 0.5 if self.fault == "turns" else None
        await super().add_trajectory_step(state, step)


def compared(completions):
    return [0.0 for _ in completions]


def no_number(completion):
    return "much"


def raises(completion):
    raise KeyError("nothing there")


def load_environment(kind="guess", fault="", held_out=False, max_turns=4):
    data = Dataset.from_dict(ROWS)
    common = {"dataset": data, "system_prompt": SYSTEM, "max_turns": max_turns}
    common["eval_dataset"] = data.select(range(4)) if held_out else None
    rubric = vf.Rubric(funcs=[exact, turns_cost], weights=[1.0, 2.0])
    alone = {name: common[name] for name in ("dataset", "system_prompt", "eval_dataset")}
    if kind == "single":
        funcs = {"number": [no_number], "raises": [raises], "group": [compared]}
        rubric = vf.Rubric(funcs=funcs.get(fault, [exact]))
        return vf.SingleTurnEnv(rubric=rubric, **alone)
    if kind == "tools":
        return vf.ToolEnv(tools=[], rubric=rubric, **alone)
    if kind == "judge":
        return vf.SingleTurnEnv(rubric=vf.JudgeRubric(judge_client=object()), **alone)
    if kind == "group":
        other = Dataset.from_dict({"question": ["Say 5."], "answer": ["5"]})
        other = vf.SingleTurnEnv(dataset=other, rubric=vf.Rubric(funcs=[exact]))
        return vf.EnvGroup([Guess(rubric=rubric, **common), other], ["guess", "say"])
    env = Guess(rubric=rubric, **common)
    env.fault = fault
    return env
