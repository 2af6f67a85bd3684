"""`distrl explain`: what a recipe does per iteration, and the memory it needs.

Beside it the checks before training starts, of memory, problems and room on disk, and
`distrl methods`: what a recipe may choose by name, from the registry.
"""

from __future__ import annotations

import inspect
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rllib_distrl.algorithm.estimates import (
    UNKNOWN_PROMPT,
    ModelShape,
    Needs,
    Room,
    Updates,
    count_updates,
    longest_sequence,
    shape_of,
    size,
    too_large,
)
from rllib_distrl.cli.session import silence_libraries
from rllib_distrl.method.registry import KINDS, Registered, methods, resolve
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.checkpoints import list_checkpoints
from rllib_distrl.runs.folder import RunFolder
from rllib_distrl.settings import CRITIC_TRUNKS, RolloutSettings, TrainingSettings

_PROMPTS_MEASURED = 64
_BYTES = 4  # of a weight or a moment: both are float32
_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_AUTHORS = re.compile(r"\(?([A-Z][\w-]+(?: (?:et al\.|& [A-Z][\w-]+))?)[ ,]+((?:19|20)\d\d)\b")
_EQUAL = TrainingSettings.defaults()["allocator"]


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of the first prompts of the task, and the longest that it admits; one as it is read.

    Attributes:
        mean: Of the first prompts.
        longest: Of them.
        limit: Of all.
        sequence: Of a prompt with its completion and, in a task of several turns, the replies.
        replies: "TURNS x TOKENS" of the replies to an episode; None where there are none.
        example: The text of one, special tokens and all.
        ends: What ends a completion, as texts.
    """

    mean: float
    longest: int
    limit: int
    sequence: int
    replies: str | None
    example: str
    ends: tuple[str, ...]


def run_explain(path: Path, overrides: Sequence[str]) -> None:
    """Prints the explanation.

    Args:
        path: A recipe.
        overrides: `table.key=value` items.

    Raises:
        ValueError: For anything that `distrl train` would refuse.
    """
    silence_libraries()
    recipe = load_recipe(path, overrides)
    config = recipe.build_config()
    updates = count_updates(config, recipe.rollout)
    prompts = _prompt_lengths(config)
    shape = shape_of(recipe.run.model)
    console = Console()
    for line in check_problems(recipe, config):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_iteration_table(recipe, config, updates, prompts))
    needs = Needs.of(config, recipe.rollout, shape, prompts.sequence)
    console.print(_memory_table(recipe, config, shape, needs))
    if room := Room.here(config):
        gpu = f", its GPU {size(room.gpu)}" if room.gpu else ""
        problem = too_large(needs, config, room)
        said = problem or f"This machine has {size(room.machine)}{gpu}."
        console.print(said, style="bold red" if problem else None, markup=False, highlight=False)
    console.print("A prompt as the model reads it:")
    console.print(prompts.example, style="cyan", markup=False, highlight=False, soft_wrap=True)
    ends = f"A completion ends with {' or '.join(map(repr, prompts.ends))}."
    console.print(ends, markup=False, highlight=False, soft_wrap=True)
    console.print("Estimates: activations and temporary copies vary with the model.", style="dim")
    for line in said_of_weights(recipe, config):
        console.print(line, style="dim", highlight=False)


def _prompt_lengths(config: Any) -> PromptLengths:
    """Renders some prompts with the recipe's tokenizer."""
    import gymnasium

    from distrl_envs.tokenizers import decode_completion

    env = gymnasium.make(config.env, disable_env_checker=True, **config.env_config)
    prompts = [env.reset(seed=index)[1]["prompt_ids"] for index in range(_PROMPTS_MEASURED)]
    lengths = list(map(len, prompts))
    inner: Any = env.unwrapped
    ends = tuple(decode_completion(inner.tokenizer, [x], ()) for x in sorted(inner.eos_token_ids))
    example = decode_completion(inner.tokenizer, prompts[0], ())
    replies = f"{inner.max_turns - 1} x {inner.max_reply_tokens}" if inner.has_turns else None
    env.close()
    return PromptLengths(
        sum(lengths) / len(lengths),
        max(lengths),
        int(inner.max_prompt_tokens),
        int(inner.max_context_tokens),
        replies,
        example,
        (*ends, *inner.stop),
    )


def _iteration_table(
    recipe: Recipe, config: Any, updates: Updates, prompts: PromptLengths
) -> Table:
    rollout, limit = recipe.rollout, recipe.rollout.max_completion_tokens
    explored = _explored(config)
    equal = explored or getattr(config, "allocator", _EQUAL) == _EQUAL
    rows = {
        "prompts": f"{rollout.prompts_per_iteration}, of {prompts.mean:.1f} tokens on average "
        f"(longest of {_PROMPTS_MEASURED}: {prompts.longest}; limit {prompts.limit})",
        "episodes": f"{updates.episodes} = {rollout.prompts_per_iteration} prompts x "
        f"{rollout.num_generations} completions"
        f"{'' if equal else ' on average'}",
        "explored": explored,
        "tokens": f"at most {updates.timesteps:,} = {updates.episodes} x {limit}",
        "replies": prompts.replies
        and f"at most {prompts.replies} tokens in an episode, beside its {limit}; with its prompt "
        f"at most {prompts.sequence:,}",
        "segments": _segments(rollout, limit),
        "sampled ahead": _ahead(rollout),
        "minibatch": f"{updates.minibatch_sequences} sequences "
        f"= at most {updates.minibatch_timesteps:,} timesteps",
        "micro-batch": said_of_micro_batches(recipe, config),
        "epochs": str(updates.epochs),
        "optimiser steps": f"{updates.steps} = {updates.epochs} x "
        f"{updates.steps // updates.epochs} minibatches per learner",
    }
    if not updates.counts_sequences:
        rows |= {
            "prompts": rows["prompts"].partition(", ")[2].capitalize(),
            "episodes": f"about {updates.episodes} or more, in groups of {rollout.num_generations}"
            f" (train batch / {limit} tokens at most each)",
            "tokens": f"about {updates.timesteps:,} (RLlib's train batch counts timesteps)",
            "minibatch": f"{updates.minibatch_timesteps:,} timesteps (RLlib's unit) "
            f"= {updates.minibatch_sequences} sequences of full length",
            "optimiser steps": f"about {updates.steps} = {updates.epochs} x "
            f"{updates.steps // updates.epochs} minibatches per learner",
        }
    rows["whole run"] = _whole_run(recipe, updates)
    table = Table(title=f"One iteration of {recipe.run.algorithm}", title_justify="left")
    table.add_column("per iteration")
    table.add_column("")
    for name, text in rows.items():
        if text is not None:
            table.add_row(name, text)
    return table


def _explored(config: Any) -> str | None:
    stage = resolve("allocator", getattr(config, "allocator", _EQUAL))
    if stage.name != "explore_filter_replay":
        return None
    chosen = stage.settings
    again = (
        f"; every {chosen['every']} iterations useful groups again, up to {chosen['capacity']:g} "
        "batches of them"
    )
    return (
        f"further {chosen['generations']} completions, at temperature {chosen['temperature']:g}, "
        f"of every prompt without a correct one{again if chosen['every'] else ''}; the numbers "
        "here are without both"
    )


def _segments(rollout: RolloutSettings, limit: int) -> str | None:
    if not rollout.segment_tokens:
        return None
    longest = -(-limit // rollout.segment_tokens)
    return (
        f"of {rollout.segment_tokens} tokens: the longest completions take {longest} iterations, "
        "and the numbers here are means, for groups are learned from when whole"
    )


def _ahead(rollout: RolloutSettings) -> str | None:
    if not (k := rollout.max_staleness):
        return None
    batches = "1 batch" if k == 1 else f"{k} batches"
    if rollout.segment_tokens:
        return f"{batches}: each token is one update older than without"
    return f"{batches}: no token is older than {k} update{'s' * (k > 1)}, and after {k} few younger"


def _whole_run(recipe: Recipe, updates: Updates) -> str:
    budget, iterations = recipe.run.budget_tokens, recipe.run.iterations
    if budget:
        least = math.ceil(budget / updates.timesteps)
        return (
            f"ends with the iteration that reaches {budget:,} tokens: {least:,} iterations, "
            f"{least * updates.steps:,} optimiser steps, or more where completions are shorter"
        )
    return (
        f"{iterations} iterations, {iterations * updates.steps:,} optimiser steps, "
        f"at most {iterations * updates.timesteps:,} tokens"
    )


def check_memory(recipe: Recipe, config: Any) -> None:
    """Refuses a run on this machine alone that cannot fit into its memory.

    Args:
        recipe: The run's.
        config: Built from it.

    Raises:
        ValueError: With what is needed, what there is, and what to do.
    """
    room = Room.here(config)
    if room is None:
        return
    shape = shape_of(recipe.run.model)

    def problem(longest: int) -> str | None:
        return too_large(Needs.of(config, recipe.rollout, shape, longest), config, room)

    # The env is made only where it could matter: with the longest prompts it would not fit.
    if not problem(UNKNOWN_PROMPT + recipe.rollout.max_completion_tokens):
        return
    if found := problem(longest_sequence(config, recipe.rollout)):
        raise ValueError(found)


def said_of_micro_batches(recipe: Recipe, config: Any) -> str | None:
    """How many token places the learner computes at once; None for RLlib's own algorithms."""
    if not hasattr(config, "micro_batch_tokens"):
        return None
    said = f"at most {config.micro_batch_tokens:,} token places"
    automatic = recipe.tables.get("training", {}).get("micro_batch_tokens", "auto") == "auto"
    return f"{said} (auto: what memory allows)" if automatic else said


def _memory_table(
    recipe: Recipe,
    config: Any,
    shape: ModelShape,
    needs: Needs,
) -> Table:
    title = f"Memory: {recipe.run.model}, {shape.parameters:,} parameters"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("memory", justify="right")
    _add_parts(table, f"each of {max(config.num_learners, 1)} learner(s)", needs.learner)
    _add_parts(table, f"each of {max(config.num_env_runners, 1)} env runner(s)", needs.runner)
    return table


def said_of_weights(recipe: Recipe, config: Any) -> list[str]:
    """What a user may not expect of the weights that learn and are exported."""
    from rllib_distrl.model.builtin import PREFIX
    from rllib_distrl.model.loading import load_config
    from rllib_distrl.model.lora import without_adapter

    if recipe.run.model.startswith(PREFIX):  # Float32, and without experts.
        return []
    model_config, lines = load_config(recipe.run.model), []
    dtype = str(getattr(model_config, "dtype", None) or "").removeprefix("torch.")
    if dtype not in ("", "float32"):
        lines.append(f"The model was saved in {dtype}; it learns and is exported in float32.")
    if lora := config.model_config.get("lora"):
        lines.append(without_adapter(lora, model_config))
    return [line for line in lines if line]


def _add_parts(table: Table, title: str, parts: Mapping[str, int]) -> None:
    table.add_row(f"[bold]{title}[/]", f"[bold]{size(sum(parts.values()))}[/]")
    for name, n_bytes in parts.items():
        table.add_row(f"  {name}", size(n_bytes))
    table.add_section()


@dataclass(frozen=True)
class Entry:
    """One method as the table shows it: all texts are read from the code."""

    kind: str
    name: str
    what: str
    source: str
    needs: str
    settings: str


def entries(kind: str | None = None) -> list[Entry]:
    """Every registered method, by kind and name.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are {', '.join(KINDS)}.")
    shipped = [
        each for one in KINDS if kind in (None, one) for each in methods(one)
        if each.function.__module__.startswith("rllib_distrl.")
    ]  # fmt: skip
    return [_entry(each) for each in shipped]


def _entry(method: Registered) -> Entry:
    text = inspect.getdoc(method.function) or ""
    needs = {} if callable(method.needs) else method.needs
    settings = [
        name if p.default is inspect.Parameter.empty else f"{name}={p.default!r}".replace("'", "")
        for name, p in method.settings().items()
    ]
    return Entry(
        method.kind,
        method.name,
        text.partition("\n\n")[0].replace("\n", " "),
        _source(text),
        "by its settings" if callable(method.needs) else ", ".join(sorted(needs)),
        ", ".join(settings),
    )


def _source(text: str) -> str:
    """The first paper that a docstring names, or that it is our choice."""
    text = " ".join(text.split())
    if found := _PAPER.search(text):
        return f"arXiv {found[1]}"
    if found := _AUTHORS.search(text):
        return f"{found[1]} {found[2]}"
    return "ours" if re.search(r"\b[Oo]urs?\b", text) else ""


def markdown() -> str:
    """The table of docs/methods.md, one part per kind."""
    parts = []
    for kind in KINDS:
        lines = [f"### {kind}", "", "| name | what | source | reads | settings |"]
        lines.append("|---|---|---|---|---|")
        for entry in entries(kind):
            cells = (f"`{entry.name}`", entry.what, entry.source, entry.needs, entry.settings)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def run_methods(kind: str | None, console: Console | None = None) -> None:
    """Prints the methods of a kind, or of all."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, show_lines=False)
    for column in ("kind", "name", "what", "settings"):
        table.add_column(column, overflow="fold", style="bold" if column == "name" else None)
    for entry in entries(kind):
        table.add_row(entry.kind, entry.name, entry.what, entry.settings)
    console.print(table)


def check_problems(recipe: Recipe, config: Any) -> list[str]:
    """Builds the task of every split that the recipe asks, as the run will.

    Args:
        recipe: Says which splits are asked.
        config: The recipe's algorithm configuration.

    Returns:
        Lines for people: how large the splits are, and whether training problems are evaluated.

    Raises:
        ValueError: If the data has faults, a split is empty or a prompt is too long.
    """
    import gymnasium

    splits = ["train", recipe.eval.split] + ["validation"] * bool(recipe.eval.interval)
    lines: list[str] = []
    for split in dict.fromkeys(splits):
        env = gymnasium.make(
            config.env, disable_env_checker=True, **{**config.env_config, "split": split}
        )
        task = getattr(env.unwrapped, "task", None)
        env.close()
        if split == "train" and task is not None:
            lines += filter(None, [task.describe_splits()])
    if recipe.eval.split == "train":
        lines.append("The evaluation asks training problems, as eval.split = 'train' says.")
    return lines


def check_room(recipe: Recipe, config: Any, run: RunFolder) -> None:
    """Checks that a run's checkpoints and its model have room.

    Args:
        recipe: Says how many checkpoints stay.
        config: Its `AlgorithmConfig`.
        run: Where they go; what is there already is counted.

    Raises:
        ValueError: If the disk has less.
    """
    settings = recipe.run
    policy, trained = _parameters(settings.model, config.model_config)
    checkpoint = _BYTES * (policy + 3 * trained)  # weights, and two moments of what learns
    # While one is written, those that it replaces are still there.
    kept = settings.keep_checkpoints + 1 + bool(settings.checkpoint_metric)
    missing = max(kept - len(list_checkpoints(run.checkpoints)), 1)
    needed = missing * checkpoint + _BYTES * policy
    place = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{run.path}: the disk has {size(free)} free, and the run needs about {size(needed)} "
            f"for {missing} checkpoint(s) of {size(checkpoint)} and the model. Make room, name "
            "another place with --out, or lower run.keep_checkpoints."
        )


def _parameters(model: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Parameters that a checkpoint holds for the sake of the policy, and those that learn."""
    from rllib_distrl.model.causal_lm import without_weights
    from rllib_distrl.model.loading import load_config
    from rllib_distrl.model.lora import count_adapter_parameters

    model_config = load_config(model)
    policy = without_weights(model_config)
    weights = sum(p.numel() for p in policy.parameters())
    trunks = 1 + CRITIC_TRUNKS.get(settings.get("critic", "separate"), 0)
    if lora := settings.get("lora"):
        return weights, trunks * count_adapter_parameters(lora, model_config)
    trunk = sum(p.numel() for p in policy.base_model.parameters())
    return 0, weights + (trunks - 1) * trunk
