"""Reasoning Gym's generators and verifiers.

A worker does it (`worker_loop`). Problems are made there too: some generators depend on the order
of sets, which is the same in all workers and not elsewhere, and what a verifier needs of a problem
is not always JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from distrl_envs.grading.worker_loop import Job

EXAMPLES = ("example_correct_answer", "possible_answer", "example_answer")
"""Where generators keep a right answer of which there are many."""
BROKEN = {"game_of_life_halting": "its verifier (0.1.25) takes any text for right"}
"""Generators whose rewards mean nothing."""
EXTRA = "pip install 'rllib-distrl[reasoning-gym]'"


def build_dataset(name: str, config: Mapping[str, Any], level: int | Mapping[str, int]) -> Any:
    """A generator of Reasoning Gym with its configuration.

    Args:
        name: As the library calls it.
        config: Arguments of the generator's configuration, which go over those of the level.
        level: Of the generator's curriculum: one for all attributes, or some by name; -1 takes the
            generator's own defaults.

    Raises:
        ValueError: If the library is missing, or a name, level or argument is unknown.
    """
    try:
        from reasoning_gym.factory import CURRICULA, DATASETS
    except ImportError as error:
        raise ValueError(f"Reasoning Gym is not installed: {EXTRA}.") from error
    if name not in DATASETS:
        from difflib import get_close_matches

        near = get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        raise ValueError(
            f"Reasoning Gym has no generator {name!r}; the nearest are {', '.join(near) or 'none'}."
        )
    if name in BROKEN:
        raise ValueError(f"The generator {name!r} cannot be trained on: {BROKEN[name]}.")
    kind, config_kind = DATASETS[name]
    arguments: dict[str, Any] = dict(config)
    curricula: Any = CURRICULA
    if level != -1:
        if name not in curricula:
            raise ValueError(f"The generator {name!r} has no curriculum: leave level out.")
        arguments = {**_of_level(curricula[name](), level), **arguments}
    try:
        if name == "composite":
            from reasoning_gym.composite import DatasetSpec

            parts = [{"config": {}, "weight": 1.0, **part} for part in arguments["datasets"]]
            arguments["datasets"] = [DatasetSpec(**part) for part in parts]
        made = config_kind(**arguments)
        if hasattr(made, "validate"):
            made.validate()
        return kind(config=made)
    except (TypeError, AssertionError, KeyError) as error:
        raise ValueError(
            f"The generator {name!r} does not take {arguments}: {error or type(error).__name__}."
        ) from error


def _of_level(curriculum: Any, level: int | Mapping[str, int]) -> dict[str, Any]:
    """The arguments that a curriculum's level stands for."""
    if isinstance(level, Mapping):
        unknown = sorted(set(level) - set(curriculum.attributes))
        if unknown:
            raise ValueError(
                f"Got levels for {unknown}; the curriculum has {sorted(curriculum.attributes)}."
            )
        for attribute, value in level.items():
            most = len(curriculum.attributes[attribute].levels) - 1
            if not 0 <= value <= most:
                raise ValueError(f"Got level {value} for {attribute!r}; it must be in 0..{most}.")
            curriculum.set_attr_level(attribute, value)
    else:
        curriculum.set_global_level(level)
    made = curriculum.generate_configuration()
    names = {
        name
        for attribute in curriculum.attributes.values()
        for name in (
            getattr(attribute, "field_name", None),
            getattr(attribute, "lower_field_name", None),
            getattr(attribute, "upper_field_name", None),
        )
    }
    return {name: getattr(made, name) for name in names if name is not None}


@lru_cache(maxsize=16)
def _dataset(name: str, config: str, level: str) -> Any:
    return build_dataset(name, json.loads(config), json.loads(level))


def _entry(dataset: Any, index: int) -> Any:
    """The problem of an index; the few generators that make all beforehand have only so many."""
    try:
        return dataset[index]
    except IndexError:
        return dataset[index % len(dataset)]


def make(name: str, config: str, level: str, index: int) -> list[Any]:
    """Question and answer of an index; the answer is None where the generator names none."""
    entry = _entry(_dataset(name, config, level), index)
    found = [entry["answer"], *(entry["metadata"].get(name) for name in EXAMPLES)]
    answer = next((one for one in found if one is not None), None)
    text = answer if isinstance(answer, str | None) else json.dumps(answer)
    return [str(entry["question"]), text]


def score(name: str, config: str, level: str, index: int, answer: str) -> float | None:
    """The generator's own score of an answer; None where its verifier raises."""
    dataset = _dataset(name, config, level)
    entry = _entry(dataset, index)
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except MemoryError:
        raise
    except Exception:
        return None


def load() -> Job:
    """What does a job, `("make", …)` or `("score", …)` with what these functions take."""
    import reasoning_gym  # noqa: F401  # type: ignore[import-not-found]

    kinds: dict[str, Job] = {"make": make, "score": score}
    return lambda kind, *asked: kinds[kind](*asked)
