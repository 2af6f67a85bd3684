"""One call from a model and the name of some data to numbers, samples and a plot on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rllib_distrl.engine.protocol import RolloutEngine
from rllib_distrl.evaluation.evaluate import ProgressCallback, evaluate_model
from rllib_distrl.evaluation.plots import plot_pass_k
from rllib_distrl.evaluation.presets import resolve_data, with_overrides
from rllib_distrl.evaluation.result import EvalResult, load_result
from rllib_distrl.evaluation.settings import EvalSettings

REPORT = "eval.json"
PLOT = "pass_at_k.png"


def run_evaluation(
    model: str | PreTrainedModel,
    data: str,
    settings: EvalSettings | Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    env_config: Mapping[str, Any] | None = None,
    data_dir: Path | str | None = None,
    task: str = "math",
    engine: str | RolloutEngine = "torch",
    compare: Sequence[Path | str] = (),
    label: str | None = None,
    overwrite: bool = False,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Evaluates ``model`` on ``data``: the whole of `distrl eval`.

    Writes `eval.json` (every number with its interval), `samples/part-*.parquet` and
    `pass_at_k.png` to ``out``; an interrupted evaluation continues there.

    Args:
        model: folder, hub id, ``builtin:…``, or a loaded causal LM.
        data: a preset's name, a file, ``hf:name/split``, or an environment id.
        settings: all of them, or only those that differ from the data's own (None: not given).
        out: folder to write; nothing is written when None.
        env_config: further arguments of the environment.
        data_dir: folder with the presets' files, instead of the hub.
        task: what grades a file: "math", "code" or "custom".
        engine: "torch" or an engine.
        compare: folders of earlier evaluations to draw into the plot.
        label: name of this one in the plot; the folder's by default.
        overwrite: replace another evaluation in ``out``.
        on_progress: called after every chunk.

    Returns:
        The graded samples; `EvalResult.report` has the numbers.

    Raises:
        ValueError: bad input, before anything is generated.
    """
    chosen = resolve_data(data, data_dir, task=task, env_config=env_config)
    if not isinstance(settings, EvalSettings):
        settings = with_overrides(chosen.settings, settings or {})
    others = {Path(folder).name: load_result(folder) for folder in compare}
    result = evaluate_model(
        model,
        chosen.env_id,
        chosen.env_config,
        settings,
        out=out,
        engine=engine,
        on_progress=on_progress,
        overwrite=overwrite,
    )
    if out is not None:
        folder = Path(out)
        result.to_json(folder / REPORT)
        subtitle = f"{chosen.name}, {result.problems} problems × {result.samples} samples"
        runs = {label or folder.resolve().name: result, **others}
        plot_pass_k(runs, folder / PLOT, subtitle=subtitle)
    return result
