"""pass@k of a run before and after training: `python tune/plot_run.py RUN OUT.png`."""

from pathlib import Path

import pandas as pd
import typer

from rllib_distrl.evaluation.result import EvalResult
from rllib_distrl.figures import plot_pass_k
from rllib_distrl.runs.folder import open_run
from rllib_distrl.settings import EvalSettings


def main(run: Path, out: Path) -> None:
    """Draws the curves with 95 % bootstrap bands over problems.

    Args:
        run: A run folder of `distrl train`.
        out: The picture to write.
    """
    samples = open_run(run).samples
    results = {
        f"{when} training": EvalResult(pd.read_parquet(samples / f"{when}.parquet"), EvalSettings())
        for when in ("before", "after")
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    plot_pass_k(results, out)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    typer.run(main)
