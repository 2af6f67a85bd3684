"""`distrl eval MODEL --data DATA`: any model on a benchmark, a file or an environment."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rllib_distrl.cli.checkpoints import export_checkpoint, find_policy
from rllib_distrl.cli.eval_progress import EvaluationProgress
from rllib_distrl.cli.interrupts import Interrupts
from rllib_distrl.cli.ray_session import hide_loading_bars
from rllib_distrl.cli.results import shown, unit_of
from rllib_distrl.recipe import load_recipe
from rllib_distrl.runs.folder import is_run_folder

if TYPE_CHECKING:
    from rllib_distrl.evaluation.result import EvalResult

_COUNTS = {"tokens": "tokens per sample", "distinct_correct": "distinct correct solutions"}
"""Estimates that are no shares, so not in %."""


@dataclass(frozen=True)
class Sampling:
    """Settings given on the command line; those of the data stand where None.

    Attributes:
        n: Samples per problem.
        k: The k of pass@k, separated by commas.
        problems: The first so many problems.
        max_tokens: Limit of a completion.
        temperature: Divides the logits.
        top_p: Nucleus.
        seed: Of the sampling.
        greedy: Take the most probable token.
    """

    n: int | None = None
    k: str | None = None
    problems: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    greedy: bool | None = None

    def given(self) -> dict[str, Any]:
        """The fields of `EvalSettings` that were given.

        Raises:
            ValueError: If k is no list of whole numbers.
        """
        values = {name: value for name, value in asdict(self).items() if value is not None}
        if self.k is not None:
            try:
                values["k"] = tuple(int(k) for k in self.k.split(","))
            except ValueError:
                raise ValueError(
                    f"--k is {self.k!r}: give whole numbers separated by commas, such as 1,2,4."
                ) from None
        if self.temperature == 0:
            raise ValueError(
                "--temperature 0 divides by nothing: give --greedy --n 1 for the most probable "
                "tokens, or a temperature above 0."
            )
        return values


@dataclass(frozen=True)
class Rows:
    """How the rows of the data are read; the data's own way where None.

    Attributes:
        task: What grades them: math, code or custom.
        format: A published form such as gsm8k.
        fields: `name=path` items, separated by commas.
        on_bad_row: error or skip.
        on_long_prompt: error or skip.
        score: `module:function` of the task custom.
    """

    task: str | None = None
    format: str | None = None
    fields: str | None = None
    on_bad_row: str | None = None
    on_long_prompt: str | None = None
    score: str | None = None

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        return [name.replace("_", "-") for name, value in asdict(self).items() if value is not None]

    def env_config(self) -> dict[str, Any]:
        """The arguments of the environment that they stand for.

        Raises:
            ValueError: If the fields are no `name=path` items.
        """
        task = {"format": self.format, "on_bad_row": self.on_bad_row, "score": self.score}
        if self.fields is not None:
            pairs = [item.partition("=") for item in self.fields.split(",")]
            if not all(name.strip() and mark and path.strip() for name, mark, path in pairs):
                raise ValueError(
                    f"--fields is {self.fields!r}: give problem=NAME,answer=NAME, where NAME is "
                    "the data's name or a path such as reward_model.ground_truth."
                )
            task["fields"] = {name.strip(): path.strip() for name, _, path in pairs}  # type: ignore[assignment]
        task = {name: value for name, value in task.items() if value is not None}
        config: dict[str, Any] = {"task_config": task} if task else {}
        if self.on_long_prompt is not None:
            config["on_long_prompt"] = self.on_long_prompt
        return config


@dataclass(frozen=True)
class DataOptions:
    """What to evaluate on, and where to.

    Attributes:
        data: A preset, a file, `hf:name/split` or an environment id; None: the target's own.
        data_dir: Folder with local copies of the presets.
        compare: Folders of earlier evaluations to draw into the plot.
        overwrite: Replace another evaluation in the output folder.
        sampling: How to sample.
        rows: How to read the data.
    """

    data: str | None = None
    data_dir: Path | None = None
    compare: Sequence[Path] = ()
    overwrite: bool = False
    sampling: Sampling = Sampling()
    rows: Rows = Rows()

    def refuse_without_data(self) -> None:
        """Raises ValueError if an option is given that only `--data` has a use for."""
        given = [name.replace("_", "-") for name in self.sampling.given()]
        given += self.rows.given()
        given += ["data-dir"] if self.data_dir is not None else []
        given += ["compare"] if self.compare else []
        given += ["overwrite"] if self.overwrite else []
        if given:
            raise ValueError(
                f"--{given[0]} needs --data. Without it the recipe says how to sample: change "
                "that with eval.n=64 and the like."
            )


def run_data_eval(
    target: Path,
    options: DataOptions,
    *,
    model: str | None,
    out: Path | None,
    console: Console,
    interrupts: Interrupts,
) -> None:
    """Evaluates on `options.data`; an interrupted evaluation in `out` continues.

    Args:
        target: A model (folder, hub id or `builtin:NAME`), a run folder, a checkpoint or a recipe.
        options: The data and how to sample.
        model: Evaluated in place of the target's.
        out: Folder for `eval.json`, `samples/` and `pass_at_k.png`; None writes nothing.
        console: Where to report.
        interrupts: Where a signal is noted, which ends the evaluation.

    Raises:
        ValueError: For bad input, before anything is generated.
        Interrupted: After a signal.
    """
    from rllib_distrl.evaluation.presets import resolve_data, with_overrides

    assert options.data is not None
    _check_compare(options.compare, out)
    chosen = resolve_data(
        options.data,
        options.data_dir,
        task=options.rows.task or "math",
        env_config=options.rows.env_config(),
    )
    with_overrides(chosen.settings, options.sampling.given()).validate()
    hide_loading_bars()
    with _model_of(target, model, console, interrupts) as name:
        result = _evaluate(name, options, out, console, interrupts)
    report = result.report() if out is None else json.loads((out / "eval.json").read_text())
    print_report(console, report, chosen.name)
    if out is not None:
        console.print(f"Wrote {out}", highlight=False)


def print_report(console: Console, report: Mapping[str, Any], data: str) -> None:
    """Prints the table of one evaluation with its intervals.

    Args:
        console: Where to.
        report: What `EvalResult.report` returns; shares in [0, 1], shown as percentages.
        data: What was evaluated on.
    """
    table = Table()
    table.add_column("metric")
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right")
    for name, (low, high) in report["intervals"].items():
        cells = [report[name], low, high]
        if name in _COUNTS:
            value, low, high = (f"{cell:.1f}" for cell in cells)
        else:
            value, low, high = (shown(name, cell, report["scores"]) for cell in cells)
            value += unit_of(name, report["scores"])
        table.add_row(_COUNTS.get(name, name), value, f"{low} to {high}")
    header = f"{data}: {report['problems']} problems, {report['samples']} samples each"
    console.print(header, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def _evaluate(
    model: str, options: DataOptions, out: Path | None, console: Console, interrupts: Interrupts
) -> EvalResult:
    from rllib_distrl.evaluation.run import run_evaluation

    assert options.data is not None
    with EvaluationProgress(console, "Evaluating", interrupts) as report:
        return run_evaluation(
            model,
            options.data,
            options.sampling.given(),
            out,
            env_config=options.rows.env_config(),
            data_dir=options.data_dir,
            task=options.rows.task or "math",
            compare=options.compare,
            overwrite=options.overwrite,
            on_progress=report,
        )


@contextmanager
def _model_of(
    target: Path, model: str | None, console: Console, interrupts: Interrupts
) -> Iterator[str]:
    """The name of the model to load, a checkpoint's exported for as long as it is needed."""
    from rllib_distrl.model.builtin import PREFIX, find_spec
    from rllib_distrl.model.loading import resolve

    if model is None and target.is_file():
        model = load_recipe(target, []).run.model
    if model is not None or not _in_run(target):
        name = model or str(target)
        # A built-in model is checked by name only: building it can wait for the data's check.
        find_spec(name) if name.startswith(PREFIX) else resolve(name)
        yield name
        return
    with ExitStack() as held:
        run, checkpoint = find_policy(target, console, held)
        folder = run.model
        if checkpoint is not None:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="distrl-"))
            export_checkpoint(run, checkpoint, Path(folder), interrupts)
        yield str(folder)


def _in_run(target: Path) -> bool:
    """Whether `target` is a run folder or a checkpoint in one."""
    checkpoints = target.resolve().parent
    in_one = checkpoints.name == "checkpoints" and is_run_folder(checkpoints.parent)
    return is_run_folder(target) or in_one


def _check_compare(compare: Sequence[Path], out: Path | None) -> None:
    """Refuses comparisons that no plot would show."""
    if not compare:
        return
    if out is None:
        raise ValueError("--compare draws into the plot, which is written with --out: give both.")
    names = Counter(folder.resolve().name for folder in (out, *compare))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"--compare and --out name two folders {twice[0]!r}, and a folder's name is that of "
            "its curve: rename one."
        )
