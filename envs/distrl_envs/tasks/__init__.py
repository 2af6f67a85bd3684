"""Tasks, one file each, and finding one by name."""

from __future__ import annotations

from typing import Any

from distrl_envs.task import Task, TaskError
from distrl_envs.user_code import load_attribute, named

TASKS = {
    "countdown": "distrl_envs.tasks.countdown:CountdownTask",
    "arithmetic": "distrl_envs.tasks.arithmetic:ArithmeticTask",
    "graph_path": "distrl_envs.tasks.graph_path:GraphPathTask",
    "sums": "distrl_envs.tasks.sums:SumsTask",
    "blackjack": "distrl_envs.tasks.blackjack:BlackjackTask",
    "mastermind": "distrl_envs.tasks.mastermind:MastermindTask",
    "countdown_check": "distrl_envs.tasks.countdown_check:CountdownCheckTask",
    "json_record": "distrl_envs.tasks.json_record:JsonRecordTask",
}
"""Names of tasks that make their problems up to `module:class`, imported when asked for."""

DATA_TASKS = {
    "math": "distrl_envs.tasks.math:MathTask",
    "code": "distrl_envs.tasks.code:CodeTask",
    "custom": "distrl_envs.tasks.custom:CustomTask",
}
"""The same for tasks that need `data=…` in their configuration."""

WRAPPERS = {"tools": "distrl_envs.tasks.tool_task:ToolTask"}
"""The same for tasks that stand around another, which `task=…` in their configuration names."""

LIBRARIES = {
    "reasoning_gym": ("generator", "distrl_envs.tasks.reasoning_gym:ReasoningGymTask"),
    "gym": ("env_id", "distrl_envs.tasks.text_envs:GymTask"),
    "textarena": ("env_id", "distrl_envs.tasks.text_envs:TextArenaTask"),
    "skyrl_gym": ("env_id", "distrl_envs.tasks.row_envs:SkyRLTask"),
    "verifiers": ("env_id", "distrl_envs.tasks.row_envs:VerifiersTask"),
}
"""What stands before `:NAME` of another library's, to the argument for NAME and `module:class`."""


def make_task(name: str, **config: Any) -> Task:
    """Builds a task.

    Args:
        name: A key of `TASKS`, `DATA_TASKS` or `WRAPPERS`, `reasoning_gym:NAME` for a generator of
            Reasoning Gym, `gym:ID` for an environment of Gymnasium with texts, `textarena:ID` for a
            game of TextArena, `skyrl_gym:ID` and `verifiers:ENV` for environments of those, or
            `module:class` of one's own.
        **config: Arguments of the task: split, seed and whatever else it takes.

    Raises:
        ValueError: If the name or an argument is unknown, or the task refuses a value.
        TaskError: If the task's own code fails while it is built.
    """
    known = TASKS | DATA_TASKS | WRAPPERS
    library, _, rest = name.partition(":")
    if rest and library in LIBRARIES:
        argument, location = LIBRARIES[library]
        config = {argument: rest, **config}
        known = known | {name: location}
    location = known.get(name, name)
    if ":" not in location:
        raise ValueError(
            f"Got task {name!r}; it must be one of {', '.join(known)}, reasoning_gym:NAME, gym:ID, "
            "textarena:ID, skyrl_gym:ID, verifiers:ENV, or module:class of your own."
        )
    factory = load_attribute(location)
    try:
        task = factory(**config)
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and (name in known or " argument" in str(error)):
            raise ValueError(
                f"The task {name!r} does not take {config}: {error}. Correct task_config."
            ) from error
        raise TaskError(f"The task {name!r} could not be built: {named(error)}") from error
    if not isinstance(task, Task):
        raise ValueError(f"{location} gave {task!r:.80}; it must give a distrl_envs.Task.")
    return task
