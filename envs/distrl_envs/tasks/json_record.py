"""A sentence of facts to be written as a JSON object: structure and content pay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distrl_envs.grading.structure_reward import checked_weights, structure_of
from distrl_envs.task import Draws, GeneratedTask, Grade, Problem, Task

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

NAMES = ("Ana", "Ben", "Chidi", "Dana", "Emre", "Fatima", "Goran", "Hana", "Igor", "Jun", "Kofi",
         "Lena", "Mara", "Nils", "Olga", "Priya", "Quinn", "Rosa", "Sami", "Tomas")  # fmt: skip
CITIES = ("Accra", "Bergen", "Cusco", "Dakar", "Evora", "Fez", "Graz", "Hanoi", "Izmir", "Jaipur",
          "Kyoto", "Lima", "Malmo", "Nantes", "Osaka", "Porto", "Quito", "Riga", "Split",
          "Turin")  # fmt: skip
JOBS = ("baker", "carpenter", "doctor", "engineer", "farmer", "gardener", "nurse", "pilot",
        "teacher", "welder")  # fmt: skip
FIELDS = ("name", "age", "city", "member", "job")
TYPES = {str: "string", int: "number", bool: "true or false"}


class JsonRecordTask(GeneratedTask):
    """Write what a sentence says as a JSON object with given keys; for pretrained models.

    `Mara is 34 years old and lives in Lima.` becomes `{"name": "Mara", "age": 34, "city": "Lima"}`.
    The reward is the weighted sum of four checks, see `grading.structure_reward`: 1 for the right
    object and nothing around it.
    """

    name = "json_record"
    max_prompt_tokens = 256
    max_completion_tokens = 96

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        fields: int = 3,
        weights: Mapping[str, float] | None = None,
    ):
        """Chooses the split, the seed, how many fields there are, and the weights of the checks.

        Raises:
            ValueError: If the split is unknown, `fields` is outside 2..5, or for weights of
                unknown checks, below 0, or none above it.
        """
        super().__init__(split, seed)
        if not 2 <= fields <= len(FIELDS):
            raise ValueError(f"Got fields={fields}; JsonRecord takes 2..{len(FIELDS)}.")
        self.fields, self.weights = FIELDS[:fields], checked_weights(weights)

    @property
    def difficulty(self) -> str:
        """The number of fields."""
        return str(len(self.fields))

    def attempt(self, draws: Draws, row: int) -> tuple[Problem, str]:
        """Draws a person."""
        drawn: dict[str, Any] = {
            "name": NAMES[draws.below(len(NAMES))],
            "age": 18 + draws.below(73),
            "city": CITIES[draws.below(len(CITIES))],
            "member": bool(draws.below(2)),
            "job": JOBS[draws.below(len(JOBS))],
        }
        record = {name: drawn[name] for name in self.fields}
        keys = ", ".join(f'"{name}" ({TYPES[type(value)]})' for name, value in record.items())
        asked = f"Write this as a JSON object with the keys {keys}, and nothing else."
        prompt = f"{asked} {_said(record)}"
        answer = json.dumps(record)
        return Problem(row, prompt, {"record": record}, json.dumps(record, sort_keys=True)), answer

    def solution(self, problem: Problem, rng: np.random.Generator) -> str:
        """The object; its keys may stand in any order."""
        record = problem.data["record"]
        return json.dumps({name: record[name] for name in rng.permutation(list(record)).tolist()})

    def grade(self, problem: Problem, completion: str, *, truncated: bool = False) -> Grade:
        """The weighted checks; `correct` where every one is passed."""
        found = structure_of(completion, problem.data["record"])
        answer = None if found.found is None else json.dumps(found.found, sort_keys=True)
        score = found.reward(self.weights)
        if min(found[:4]) == 1.0:
            return Grade(score, "correct", answer)
        if truncated:
            return Grade(score, "too_long", answer)
        return Grade(score, "no_answer" if answer is None else "wrong", answer)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """None of its own: JSON's signs are no words of the small tokenizer.

        Raises:
            ValueError: Always.
        """
        return Task.tokenizer(self)


def _said(record: Mapping[str, Any]) -> str:
    """The facts in English."""
    sentences = [f"{record['name']} is {record['age']} years old."]
    if "city" in record:
        sentences.append(f"{record['name']} lives in {record['city']}.")
    if "member" in record:
        sentences.append(f"{record['name']} is {'' if record['member'] else 'not '}a member.")
    if "job" in record:
        sentences.append(f"{record['name']} works as a {record['job']}.")
    return " ".join(sentences)
