"""The `distrl` command: commands, options and exit codes.

Only names and help texts live here; each command imports what it needs when it runs, so that
`distrl --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rllib_distrl.cli.session import exit_code_of
from rllib_distrl.runs.checkpoints import TrainingStopped


class _ErrorGroup(TyperGroup):
    """Turns expected errors into one red paragraph and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, KeyboardInterrupt, TrainingStopped) as error:
            raise typer.Exit(exit_code_of(error)) from error


app = typer.Typer(
    cls=_ErrorGroup,
    help="Distributional reinforcement learning of language models through RLlib.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe (TOML); a run folder with --resume.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="Settings that replace the recipe's."),
]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; runs/NAME-seedSEED if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in there.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that is in there first.")
    ] = False,
) -> None:
    """Train a model, evaluating it on held-out problems before and after."""
    from rllib_distrl.cli.train import run_train

    run_train(recipe, overrides or [], out=out, resume=resume, overwrite=overwrite)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|RUN|RECIPE",
            help="A run folder, a checkpoint or a recipe; with --data also a model: a folder, a "
            "hub id or builtin:NAME.",
        ),
    ],
    overrides: OverridesArgument = None,
    model: Annotated[
        str | None, typer.Option(help="Evaluate this model (folder or id) instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval.json, the samples and the plot.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Evaluate on this: a preset (gsm8k, math500, aime24, ...), a .jsonl, .json, "
            ".parquet or .csv file, hf:name/split or an environment id. The recipe's if not given."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with local copies of the presets.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Samples per problem.")] = None,
    k: Annotated[str | None, typer.Option("--k", help="The k of pass@k, such as 1,2,4.")] = None,
    problems: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of a completion.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; 1 turns it off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy", help="The most probable tokens; with --n 1.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What grades the data: math (default), code or custom.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="module:function of --task custom.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Published form of the data, such as gsm8k.")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Where the data has what: problem=question,answer=final.")
    ] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="error (default) or skip.")] = None,
    on_long_prompt: Annotated[str | None, typer.Option(help="error (default) or skip.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Earlier --out folder to draw as well; repeatable.")
    ] = None,
    critic: Annotated[
        Path | None,
        typer.Option(help="A run or checkpoint whose critic chooses among the samples, or stops."),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            help="A .csv, .jsonl or .parquet file with the columns problem, sample and right: how "
            "often the verifier errs on these samples of --out."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another evaluation in the folder.")
    ] = False,
) -> None:
    """Measure avg@n and pass@k of a run, a checkpoint or a model on held-out problems.

    Data of your own choice: --data. The same command continues an evaluation that was stopped.
    """
    from rllib_distrl.cli.eval import Asked, run_eval

    sampling = {
        "n": n, "k": k, "problems": problems, "max_tokens": max_tokens,
        "temperature": temperature, "top_p": top_p, "seed": seed, "greedy": greedy,
    }  # fmt: skip
    asked = Asked(data, data_dir, task, on_long_prompt, fields, form, on_bad_row, score)
    run_eval(
        target, overrides or [], model=model, out=out, asked=asked, sampling=sampling,
        compare=compare or (), overwrite=overwrite, judge=critic, labels=audit,
    )  # fmt: skip


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a job that trains.")],
    n: Annotated[int, typer.Argument(metavar="N", help="How many remote env runners.")],
) -> None:
    """Change the number of env runners of a running job."""
    from rllib_distrl.cli.scale import run_scale

    run_scale(run, n)


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="distrl, grpo, ppo, ...; any other lists all.")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="NAME.toml if not given.")
    ] = None,
) -> None:
    """Write a recipe to start from."""
    from rllib_distrl.recipe_schema import nearest

    # A wheel brings them beside the package; a source tree has them in `configs/`.
    package = Path(__file__).parents[1]
    packed, source = package / "recipes", package.parent / "configs" / "countdown"
    known = {p.stem: p for p in (packed if packed.is_dir() else source).glob("*.toml")}
    if name not in known:
        raise ValueError(
            f"There is no recipe {name!r}. The nearest one is {nearest(name, known)!r}; there are "
            f"{', '.join(sorted(known))}."
        )
    target = out or Path(f"{name}.toml")
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError:
        raise ValueError(f"{target} exists and is left alone. Name another file.") from None
    typer.echo(f"Wrote {target}. Look at it with: distrl explain {target}")


@app.command()
def methods(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="advantage, policy_loss, ...; all.")
    ] = None,
) -> None:
    """List what a recipe may choose by name, with its settings."""
    from rllib_distrl.cli.explain import run_methods

    run_methods(kind)


@app.command()
def explain(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Show what a recipe does per iteration and what memory it needs; starts nothing."""
    import atexit
    import gc

    from rllib_distrl.cli.explain import run_explain

    # Most of the time goes into importing RLlib and Transformers, which leaves no garbage; looking
    # for some among ever more objects took a sixth of it, and once more at the end a fifth.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        run_explain(recipe, overrides or [])
    finally:
        gc.enable()


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or a checkpoint in it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the model to.")],
    critic: Annotated[
        bool, typer.Option("--critic", help="Write the critic (for training.critic_checkpoint).")
    ] = False,
) -> None:
    """Write the policy as a plain Hugging Face folder, or the critic alone."""
    from rllib_distrl.cli.checkpoints import run_export

    run_export(source, out, critic=critic)


@app.command()
def view(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|SAMPLES",
            help="A run folder, a Parquet file of samples, or the folder of an evaluation.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; view.html in the run if not given.")
    ] = None,
    entropy_at: Annotated[
        str | None,
        typer.Option(
            help="Words such as wait,but,check: also the mean entropy at tokens that are one."
        ),
    ] = None,
) -> None:
    """Write a page that shows what the critic believed at every token."""
    from rllib_distrl.cli.pages import run_view

    run_view(source, out, entropy_at)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the run if not given.")
    ] = None,
) -> None:
    """Write a page with settings, curves, calibration, time and failures of runs."""
    from rllib_distrl.cli.pages import run_report

    run_report(runs, out)


def main() -> None:
    """Entry point of the console script."""
    app()
