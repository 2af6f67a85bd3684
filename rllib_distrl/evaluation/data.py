r"""What an evaluation asks: a recipe's problems, benchmarks by name, files, environments.

Sampling follows what the field compares: temperature 0.6 and top-p 0.95 (DeepSeek-R1; Yue et al.
2025, "Does reinforcement learning really incentivize reasoning capacity"), many samples where
problems are few. The limit of 3,072 tokens fits models with a window of 4,096 (Qwen2.5-Math);
models that think longer need a larger ``max_tokens``. Where a data set lives and how its fields
are called was read from public evaluation code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distrl_envs.data import READERS
from rllib_distrl.recipe import Recipe
from rllib_distrl.recipe_schema import ALIKE, nearest
from rllib_distrl.settings import EvalSettings

MATH_ENV_ID = "distrl_envs:distrl/Math-v0"
ENV_IDS = {
    "math": MATH_ENV_ID,
    "code": "distrl_envs:distrl/Code-v0",
    "custom": "distrl_envs:distrl/Custom-v0",
}
"""What grades the rows of a file, by the task's name."""
_DATA_ENVS = {id_.rpartition("/")[2]: task for task, id_ in ENV_IDS.items()}
FILE_ENDINGS = tuple(READERS)
LARGEST = 1_000_000
"""More problems than any data set has: all of them."""

LONGEST_PROMPT = 1 << 15
"""More tokens than any problem here has: the model's window decides, not the environment."""

PASS_K_FEW = (1, 2, 4, 8, 16, 32, 64)
PASS_K_MANY = (1, 2, 4, 8)
MATH_SETTINGS = EvalSettings(
    problems=LARGEST,
    n=64,
    k=PASS_K_FEW,
    max_tokens=3072,
    temperature=0.6,
    top_p=0.95,
    distinct_by="completion",
)
BROAD_SETTINGS = MATH_SETTINGS.changed(n=8, k=PASS_K_MANY)


@dataclass(frozen=True)
class Preset:
    """A benchmark.

    Attributes:
        hub: Hugging Face data set as ``name/split`` or ``name/config/split``.
        file: What a local copy is called, with fields ``problem`` and ``answer``.
        problems: How many it has.
        settings: How it is sampled.
        hub_fields: The data set's own names for problem and answer.
        gold_pattern: Regular expression whose group is the answer, where the hub's field holds
            more than that.
    """

    hub: str
    file: str
    problems: int
    settings: EvalSettings = MATH_SETTINGS
    hub_fields: Mapping[str, str] = field(
        default_factory=lambda: {"problem": "problem", "answer": "answer"}
    )
    gold_pattern: str | None = None


_QUESTION = {"problem": "question", "answer": "answer"}

PRESETS: dict[str, Preset] = {
    "aime24": Preset("HuggingFaceH4/aime_2024/train", "aime24.jsonl", 30),
    "aime25": Preset("math-ai/aime25/test", "aime25.jsonl", 30),
    "amc23": Preset("math-ai/amc23/test", "amc23.jsonl", 40, hub_fields=_QUESTION),
    "math500": Preset("HuggingFaceH4/MATH-500/test", "math500.jsonl", 500, BROAD_SETTINGS),
    "minerva": Preset("math-ai/minervamath/test", "minerva.jsonl", 272, BROAD_SETTINGS, _QUESTION),
    "olympiadbench": Preset(
        "math-ai/olympiadbench/test",
        "olympiadbench.jsonl",
        675,
        BROAD_SETTINGS,
        {"problem": "question", "answer": "final_answer"},
    ),
    "college_math": Preset(
        "realtreetune/college_math/test", "college_math.jsonl", 2818, BROAD_SETTINGS
    ),
    "beyondaime": Preset("ByteDance-Seed/BeyondAIME/test", "beyondaime.jsonl", 100),
    "gsm8k": Preset(
        "openai/gsm8k/main/test",
        "gsm8k_test.jsonl",
        1319,
        BROAD_SETTINGS,
        _QUESTION,
        r"####\s*(.+?)\s*$",
    ),
}


@dataclass(frozen=True)
class EvalData:
    """Problems, and how they are sampled unless the user says otherwise.

    Attributes:
        name: For titles.
        env_id: Gymnasium id.
        env_config: Arguments of the environment.
        settings: How it is sampled.
    """

    name: str
    env_id: str
    env_config: dict[str, Any]
    settings: EvalSettings


def recipe_data(recipe: Recipe) -> EvalData:
    """What a recipe's `[eval]` table asks."""
    name = recipe.env_id.rpartition("/")[2]
    return EvalData(name, recipe.env_id, recipe.env_config, recipe.eval_settings)


def resolve_data(
    data: str,
    data_dir: Path | str | None = None,
    *,
    task: str = "math",
    env_config: Mapping[str, Any] | None = None,
) -> EvalData:
    """Finds the environment that a name, a file or an id stands for.

    Args:
        data: a preset's name, a file (``.jsonl``, ``.json``, ``.parquet`` or ``.csv``) with fields
            ``problem`` and ``answer``, ``hf:name/split``, or an environment id. A file or hub
            split is asked whole, as the test split that it then is.
        data_dir: folder with the presets' files, instead of the Hugging Face hub.
        task: what grades a file or hub split: "math", "code" or "custom".
        env_config: further arguments of the environment; those of ``task_config`` are added to
            what the data stand for.

    Returns:
        Environment and settings.

    Raises:
        ValueError: a file that does not exist, or a name that is none of these.
    """
    env_config = env_config or {}
    found = _resolve(data, data_dir, task, env_config)
    given = {**found.env_config.get("task_config", {}), **env_config.get("task_config", {})}
    if "format" in given and "fields" not in env_config.get("task_config", {}):
        given.pop("fields", None)
    merged = {**found.env_config, **env_config}
    return replace(found, env_config=merged | ({"task_config": given} if given else {}))


def _resolve(
    data: str, data_dir: Path | str | None, task: str, env_config: Mapping[str, Any]
) -> EvalData:
    if task not in ENV_IDS:
        raise ValueError(f"task {task!r} does not grade data: choose one of {', '.join(ENV_IDS)}.")
    if data in PRESETS:
        return _preset_data(data, PRESETS[data], data_dir)
    if data.startswith("hf:"):
        return EvalData(data, ENV_IDS[task], _data_config(data), BROAD_SETTINGS)
    if Path(data).suffix.lower() in FILE_ENDINGS:
        _check_file(Path(data), "give a path that exists")
        return EvalData(Path(data).stem, ENV_IDS[task], _data_config(data), BROAD_SETTINGS)
    if re.search(r"-v\d+$", data):
        name = data.rsplit(":", 1)[-1].rsplit("/", 1)[-1]
        if name in _DATA_ENVS and not env_config.get("task_config", {}).get("data"):
            raise ValueError(
                f"{data} needs problems: give a file or hf:name/split as --data, with --task "
                f"{_DATA_ENVS[name]} where it is not mathematics; from Python also "
                "env_config={'task_config': {'data': ...}}."
            )
        return EvalData(name, data, {}, EvalSettings())
    near = nearest(data, PRESETS, ALIKE)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ValueError(
        f"data {data!r} is neither a preset ({', '.join(PRESETS)}), nor a file "
        f"({', '.join(FILE_ENDINGS)}), nor hf:name/split, nor an environment id.{hint}"
    )


def _preset_data(name: str, preset: Preset, data_dir: Path | str | None) -> EvalData:
    if data_dir is None:
        config = _data_config(f"hf:{preset.hub}", preset.hub_fields, preset.gold_pattern)
    else:
        path = Path(data_dir) / preset.file
        _check_file(path, f"put a copy of {preset.hub} there, or leave the folder out")
        config = _data_config(str(path))
    return EvalData(name, MATH_ENV_ID, config, preset.settings)


def _data_config(
    data: str, names: Mapping[str, str] | None = None, gold_pattern: str | None = None
) -> dict[str, Any]:
    """Arguments of an environment that asks all of some data, as the test split that it is."""
    task: dict[str, Any] = {"data": {"test": data}}
    if names is not None:
        task["fields"] = dict(names)
    if gold_pattern is not None:
        task["gold_pattern"] = gold_pattern
    return {"task_config": task, "max_prompt_tokens": LONGEST_PROMPT}


def _check_file(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {remedy}.")
