"""What commands do with a checkpoint of a run: export its policy or critic, judge the critic."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rllib_distrl.cli.display import knows_critic
from rllib_distrl.cli.session import Interrupts, hide_loading_bars, silence_libraries
from rllib_distrl.files import replaced_folder
from rllib_distrl.recipe import Recipe
from rllib_distrl.runs.checkpoints import (
    hold_checkpoint,
    hold_latest,
    verify_checkpoint,
)
from rllib_distrl.runs.folder import RunFolder, is_run_folder


def run_export(source: Path, out: Path, *, critic: bool = False) -> None:
    """Writes the model.

    Args:
        source: A run folder or one of its checkpoints.
        out: A folder that does not exist or is empty.
        critic: Write the critic in place of the policy.

    Raises:
        ValueError: If `source` is neither, or `out` holds files.
        Interrupted: After a signal, with nothing written.
    """
    silence_libraries()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Name another place.")
    console = Console()
    with Interrupts("Stopping. Ctrl-C again stops at once.") as interrupts, ExitStack() as held:
        find = find_checkpoint if critic else find_policy
        run, checkpoint = find(source, console, held)
        with replaced_folder(out.resolve()) as folder:
            if checkpoint is None:
                shutil.copytree(run.model, folder, dirs_exist_ok=True)
            else:
                export_checkpoint(run, checkpoint, folder, interrupts, critic=critic)
            interrupts.check()
    kind = "" if critic else " in float32, as it is learned"
    console.print(f"Wrote {out}{kind}", highlight=False)


def find_policy(source: Path, console: Console, held: ExitStack) -> tuple[RunFolder, Path | None]:
    """Returns the run that `source` belongs to, and the checkpoint to take the policy from.

    The checkpoint is None where the run's `model/` holds the policy. A run that goes on does not
    prune it before `held` is closed.

    Raises:
        ValueError: If `source` is neither a run nor a checkpoint, holds no policy or is damaged.
    """
    if is_run_folder(source) and RunFolder(source).model.is_dir():
        return RunFolder(source), None
    return find_checkpoint(source, console, held)


def find_checkpoint(source: Path, console: Console, held: ExitStack) -> tuple[RunFolder, Path]:
    """Returns the run that `source` belongs to, and its newest good checkpoint or `source`.

    See `find_policy`.
    """
    if is_run_folder(source):
        run = RunFolder(source)
        checkpoint = hold_latest(run.checkpoints, lambda text: console.print(text), held)
        if checkpoint is None:
            raise ValueError(f"{source} holds no good checkpoint yet.")
        return run, checkpoint
    run_path = source.resolve().parent.parent
    if (
        source.is_dir()
        and is_run_folder(run_path)
        and source.resolve().parent.name == "checkpoints"
    ):
        hold_checkpoint(source.resolve(), held)
        verify_checkpoint(source)
        return RunFolder(run_path), source.resolve()
    raise ValueError(f"{source} is neither a run folder nor a checkpoint in one.")


def export_checkpoint(
    run: RunFolder,
    checkpoint: Path,
    out: Path,
    interrupts: Interrupts | None = None,
    *,
    critic: bool = False,
) -> None:
    """Restores a checkpoint into the run's algorithm and writes its policy or its critic."""
    from rllib_distrl.algorithm.export import export_critic, export_policy

    with restored(run, checkpoint, interrupts) as algo:
        (export_critic if critic else export_policy)(algo, out)


@contextmanager
def restored(
    run: RunFolder, checkpoint: Path, interrupts: Interrupts | None = None
) -> Iterator[Any]:
    """The run's algorithm in the state of a checkpoint, without actors, in a Ray session."""
    from rllib_distrl.cli.session import ray_session

    hide_loading_bars()
    config: Any = run.recipe().build_config()
    # Only the learner's state is needed: no actors.
    config.env_runners(num_env_runners=0)
    config.learners(num_learners=0)
    if getattr(config, "sharding", "none") != "none":
        config.training(sharding="none")
    config.evaluation(evaluation_interval=None, evaluation_num_env_runners=0)
    with ray_session(config, interrupts):
        algo = config.build_algo()
        try:
            algo.restore_from_path(str(checkpoint.resolve()))
            if interrupts is not None:
                interrupts.check()
            yield algo
        finally:
            algo.stop()


def probe(algo: Any, recipe: Recipe) -> dict[str, float]:
    """Judges an algorithm's critic as the recipe's `[eval]` table says; {} where that is off.

    Returns:
        What `algorithm.critic_probe.probe_critic` returns; {} without a critic.
    """
    from rllib_distrl.algorithm.critic_probe import probe_critic

    if not recipe.eval.critic_prefixes:
        return {}
    found = probe_critic(
        algo,
        prefixes=recipe.eval.critic_prefixes,
        continuations=recipe.eval.critic_continuations,
        split=recipe.eval.split,
    )
    return found if knows_critic(found) else {}


def probe_checkpoint(
    run: RunFolder, checkpoint: Path, recipe: Recipe, interrupts: Interrupts
) -> dict[str, float]:
    """Judges the critic of a checkpoint; see `probe`."""
    if not recipe.eval.critic_prefixes:
        return {}
    with restored(run, checkpoint, interrupts) as algo:
        return probe(algo, recipe)
