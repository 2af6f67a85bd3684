"""`distrl eval`: avg@n and pass@k of a run, a checkpoint or any model, on any problems."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from rllib_distrl.cli.checkpoints import (
    export_checkpoint,
    find_checkpoint,
    find_policy,
    probe_checkpoint,
    restored,
)
from rllib_distrl.cli.display import (
    EvaluationProgress,
    print_audit,
    print_critic,
    print_judged,
    print_report,
    problems_of,
)
from rllib_distrl.cli.session import Interrupts, hide_loading_bars, silence_libraries
from rllib_distrl.files import write_atomic
from rllib_distrl.recipe import Recipe, load_recipe
from rllib_distrl.runs.checkpoints import list_checkpoints
from rllib_distrl.runs.folder import RunFolder, is_run_folder

if TYPE_CHECKING:
    from rllib_distrl.evaluation.data import EvalData

_STOPPING = "Stopping; the problems that are finished are kept. Ctrl-C again stops at once."
_CONTINUE = "The same command continues."


@dataclass(frozen=True)
class Asked:
    """The problems of an evaluation, as the command line names them.

    Attributes:
        data: A preset, a file, `hf:name/split` or an environment id; None: the target's own.
        data_dir: Folder with local copies of the presets.
        task: What grades them: math, code or custom.
        on_long_prompt: error or skip.
        fields: `name=path` items, separated by commas.
        form: A published form such as gsm8k.
        on_bad_row: error or skip.
        score: `module:function` of the task custom.
    """

    data: str | None = None
    data_dir: Path | None = None
    task: str | None = None
    on_long_prompt: str | None = None
    fields: str | None = None
    form: str | None = None
    on_bad_row: str | None = None
    score: str | None = None

    def resolve(self) -> EvalData:
        """The problems that `data` stands for.

        Raises:
            ValueError: If it stands for none.
        """
        from rllib_distrl.evaluation.data import resolve_data

        assert self.data is not None
        return resolve_data(
            self.data, self.data_dir, task=self.task or "math", env_config=self._env_config()
        )

    def refuse_without_data(self) -> None:
        """Raises ValueError if something is given that only `--data` has a use for."""
        given = [name for name, value in vars(self).items() if value is not None]
        if given and self.data is None:
            option = {"form": "format"}.get(given[0], given[0].replace("_", "-"))
            raise ValueError(
                f"--{option} needs --data: without it the recipe names the problems. Change that "
                "with environment.env_config.task_config.KEY=VALUE."
            )

    def _env_config(self) -> dict[str, Any]:
        task: dict[str, Any] = {
            "format": self.form, "on_bad_row": self.on_bad_row, "score": self.score,
        }  # fmt: skip
        if self.fields is not None:
            pairs = [item.partition("=") for item in self.fields.split(",")]
            if not all(name.strip() and mark and path.strip() for name, mark, path in pairs):
                raise ValueError(
                    f"--fields is {self.fields!r}: give problem=NAME,answer=NAME, where NAME is "
                    "the data's name or a path such as reward_model.ground_truth."
                )
            task["fields"] = {name.strip(): path.strip() for name, _, path in pairs}
        task = {name: value for name, value in task.items() if value is not None}
        long = {"on_long_prompt": self.on_long_prompt} if self.on_long_prompt is not None else {}
        return ({"task_config": task} if task else {}) | long


def run_eval(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    out: Path | None = None,
    asked: Asked = Asked(),
    sampling: Mapping[str, Any] | None = None,
    compare: Sequence[Path] = (),
    overwrite: bool = False,
    judge: Path | None = None,
    labels: Path | None = None,
) -> None:
    """Runs the command; an interrupted evaluation in `out` continues.

    Args:
        target: A recipe (evaluates its starting model), a run folder or a checkpoint; a model
            (folder, hub id or `builtin:NAME`) where data are named.
        overrides: `table.key=value` items of the recipe.
        model: A folder or id to evaluate in place of the target's.
        out: Folder for `eval.json`, `samples/` and `pass_at_k.png`; None writes nothing.
        asked: The problems.
        sampling: Settings of `EvalSettings` that differ from those of the problems (None: they do
            not); k as text, separated by commas.
        compare: Folders of earlier evaluations to draw into the plot.
        overwrite: Replace another evaluation in `out`.
        judge: A run or a checkpoint whose critic chooses among the samples; see
            `evaluation.critic`.
        labels: A file that says which samples in `out` are right; see `measures.read_labels`.

    Raises:
        ValueError: For bad input, before anything is generated.
        Interrupted: After a signal.
    """
    silence_libraries()
    console = Console()
    known = _labels(labels, out)
    asked.refuse_without_data()
    _check_compare(compare, out)
    if asked.data is not None and overrides:
        raise ValueError(
            f"{overrides[0]} changes a recipe, which does not decide what happens with "
            "--data: use options such as --n 64."
        )
    words = f"Stopped. {_CONTINUE}" if out else "Stopped."
    with Interrupts(_STOPPING, words) as interrupts, ExitStack() as held:
        policy = _find(target, overrides, model, asked, console, held)
        data = policy.data(asked, _settings(sampling or {}))
        judging = None if judge is None else _judge(judge, console, held)
        hide_loading_bars()
        also: dict[str, Any] = {"split": data.settings.split}
        if critic := policy.critic(console, interrupts, held):
            also["critic"] = critic
        name = policy.load(interrupts, held)
        if judging is not None:
            _check_judged(judging, name, data)
        from rllib_distrl.evaluation.evaluate import REPORT, run_evaluation

        with EvaluationProgress(console, "Evaluating", interrupts) as progress:
            result = run_evaluation(
                name, data, out=out, compare=compare, overwrite=overwrite, on_progress=progress,
                also=also,
            )  # fmt: skip
        judged = {} if judging is None else _judged(judging, name, data, result, interrupts)
    report = result.report() if out is None else json.loads((out / REPORT).read_text())
    audited = {} if known is None else _audited(result, known)
    further = {"chosen_by_critic": judged, "audit": audited}
    if out is not None and any(further.values()):
        report |= {name: found for name, found in further.items() if found}
        write_atomic(out / REPORT, json.dumps(report, indent=2) + "\n")
    print_report(
        console, report, data.name, problems_of(also) if asked.data is None else "problems"
    )
    print_critic(console, critic, also["split"])
    print_judged(console, judged)
    print_audit(console, audited)
    if out is not None:
        console.print(f"Wrote {out}", highlight=False, markup=False, soft_wrap=True)


def _labels(path: Path | None, out: Path | None) -> Any:
    """The labels of samples in `out`; None where none are named.

    Raises:
        ValueError: If the file holds none, or there is no `out`.
    """
    from rllib_distrl.evaluation.measures import read_labels

    if path is None:
        return None
    if out is None:
        raise ValueError("--audit compares labels with the samples in --out: give both.")
    return read_labels(path)


def _audited(result: Any, labels: Any) -> dict[str, Any]:
    from rllib_distrl.evaluation.measures import audit_samples

    return audit_samples(result.frame, labels)


class _Judge(NamedTuple):
    """A critic that is asked."""

    run: RunFolder
    checkpoint: Path
    config: Any


def _judge(source: Path, console: Console, held: ExitStack) -> _Judge:
    """The critic in a run or a checkpoint.

    Raises:
        ValueError: If there is none, or no critic that could judge.
    """
    from rllib_distrl.evaluation.critic import check_judge

    run, checkpoint = find_checkpoint(source, console, held)
    config = run.recipe().build_config()
    check_judge(config)
    return _Judge(run, checkpoint, config)


def _check_judged(judging: _Judge, model: str, data: EvalData) -> None:
    """Raises ValueError where the critic could not read the samples."""
    from rllib_distrl.evaluation.critic import judge_env

    judge_env(judging.config, model, data).close()


def _judged(
    judging: _Judge,
    model: str,
    data: EvalData,
    result: Any,
    interrupts: Interrupts,
) -> dict[str, Any]:
    from rllib_distrl.evaluation.critic import judge_samples

    with restored(judging.run, judging.checkpoint, interrupts) as algo:
        return judge_samples(algo, model, data, result)


@dataclass(frozen=True)
class _Policy:
    """What is evaluated.

    Attributes:
        name: Of a model; "" where a run's checkpoint is to be exported first.
        recipe: Whose problems are asked unless others are named.
        run: Where the policy was trained.
        target: What the user named.
        checkpoint: To take it from; None: the run's `model/`.
    """

    name: str
    recipe: Recipe | None = None
    run: RunFolder | None = None
    target: Path = Path()
    checkpoint: Path | None = None

    def data(self, asked: Asked, sampling: Mapping[str, Any]) -> EvalData:
        """The problems, and how they are sampled.

        Raises:
            ValueError: For settings that do not fit.
        """
        from rllib_distrl.evaluation.data import recipe_data

        found = recipe_data(self.recipe) if self.recipe is not None else asked.resolve()
        return replace(found, settings=found.settings.changed(**sampling))

    def critic(self, console: Console, interrupts: Interrupts, held: ExitStack) -> dict[str, float]:
        """What the critic of the run knows; only checkpoints hold critics."""
        if self.run is None or self.recipe is None or not self.recipe.eval.critic_prefixes:
            return {}
        if not list_checkpoints(self.run.checkpoints):
            console.print("No report on the critic: the run has no checkpoint.", highlight=False)
            return {}
        checkpoint = self.checkpoint or find_checkpoint(self.target, console, held)[1]
        return probe_checkpoint(self.run, checkpoint, self.recipe, interrupts)

    def load(self, interrupts: Interrupts, held: ExitStack) -> str:
        """The name of the model to load, a checkpoint's exported for as long as it is needed."""
        if self.run is None or self.checkpoint is None:
            return self.name
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="distrl-"))
        export_checkpoint(self.run, self.checkpoint, Path(folder), interrupts)
        return folder


def _find(
    target: Path,
    overrides: Sequence[str],
    model: str | None,
    asked: Asked,
    console: Console,
    held: ExitStack,
) -> _Policy:
    """What `target` names.

    Raises:
        ValueError: If it is nothing that can be evaluated.
    """
    own = asked.data is None
    if target.is_file():
        recipe = load_recipe(target, overrides)
        return _checked(model or recipe.run.model, recipe if own else None)
    if _in_run(target) and (model is None or own):
        run, checkpoint = find_policy(target, console, held)
        recipe = load_recipe(run.recipe_file, overrides) if own else None
        if model is not None:
            return _checked(model, recipe)
        return _Policy(str(run.model), recipe, run, target, checkpoint)
    if own:
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint in one, nor a recipe. To evaluate "
            "a model of this name, say on what: --data gsm8k, --data FILE.jsonl, ..."
        )
    return _checked(model or str(target), None)


def _checked(name: str, recipe: Recipe | None) -> _Policy:
    """A model that exists.

    A built-in one is checked by name only: building it can wait for the check of the problems.
    """
    from rllib_distrl.model.builtin import PREFIX, find_spec
    from rllib_distrl.model.loading import resolve

    find_spec(name) if name.startswith(PREFIX) else resolve(name)
    return _Policy(name, recipe)


def _in_run(target: Path) -> bool:
    """Whether `target` is a run folder or a checkpoint in one."""
    checkpoints = target.resolve().parent
    in_one = checkpoints.name == "checkpoints" and is_run_folder(checkpoints.parent)
    return is_run_folder(target) or in_one


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `EvalSettings` that were given."""
    values = {name: value for name, value in options.items() if value is not None}
    if "k" in values:
        try:
            values["k"] = tuple(int(k) for k in values["k"].split(","))
        except ValueError:
            raise ValueError(
                f"--k is {values['k']!r}: give whole numbers separated by commas, such as 1,2,4."
            ) from None
    if values.get("temperature") == 0:
        raise ValueError(
            "--temperature 0 divides by nothing: give --greedy --n 1 for the most probable "
            "tokens, or a temperature above 0."
        )
    return values


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
