"""Imports point one way, and the environments need no Ray."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_distrl import moved

ROOT = Path(__file__).parents[1]
# Every folder may import those before it; folders of one line do not know one another's order.
LAYERS = [
    {"maths", "recipe_schema", "files", "moved", "rllib_traps"},
    {"settings", "figures"},
    {"method"},
    {"engine", "model"},
    {"learner", "rollout"},
    {"algorithm"},
    {"recipe"},
    {"evaluation", "runs"},
    {"viewer"},
    {"experiments"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Everything that a file names in an import, inside of functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_environments_import_neither_ray_nor_the_plugin():
    for path in (ROOT / "envs" / "distrl_envs").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"ray", "rllib_distrl"}, path


def test_modules_that_are_named_in_strings_are_of_the_layers_below():
    """An import that is made of a string is seen only when it runs: by all settings at once."""
    code = (
        "import sys; from rllib_distrl.settings import TrainingSettings\n"
        "TrainingSettings(**TrainingSettings.defaults()); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("rllib_distrl.")}
    assert "rllib_distrl.maths.optimism" in loaded
    for name in loaded:
        assert RANK[name.split(".")[1]] <= RANK["settings"], name
        assert name.removeprefix("rllib_distrl.") not in moved.MODULES, name


def test_pure_maths_imports_only_torch_and_itself():
    for folder in ("maths", "method"):
        for path in (ROOT / "rllib_distrl" / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"ray", "transformers", "gymnasium"}, path


def test_layers_import_downwards():
    for path in (ROOT / "rllib_distrl").rglob("*.py"):
        parts = path.relative_to(ROOT / "rllib_distrl").with_suffix("").parts
        rank = RANK.get(parts[0])
        if rank is None:
            continue
        for name in imports(path):
            if name.startswith("rllib_distrl."):
                target = name.split(".")[1]
                assert RANK.get(target, -1) <= rank, f"{path} imports {name}"


@pytest.mark.parametrize("package", ["rllib_distrl", "envs/distrl_envs"])
def test_no_files_import_one_another_in_a_circle(package):
    root = (ROOT / package).parent
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in (ROOT / package).rglob("*.py")
    }
    # Whoever reads an equation compares its sides, and these are read: two files call one another.
    files.pop("distrl_envs.grading.structures", None)
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("explain", "matplotlib numba pandas ray torch transformers"),
        ("pages", "matplotlib numba ray sklearn torch transformers"),
    ],
)
def test_commands_start_without_what_they_do_not_need(name, absent):
    code = f"import rllib_distrl.cli.{name}, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(absent.split()) & set(done.stdout.split())


def test_modules_are_found_under_their_former_names():
    with pytest.warns(DeprecationWarning, match=r"rllib_distrl\.algorithm\.distrl now"):
        old = importlib.import_module("rllib_distrl.algorithms.distrl")
    assert old is importlib.import_module("rllib_distrl.algorithm.distrl")
    assert old.__spec__.name == "rllib_distrl.algorithm.distrl"
    for name in ("algorithms.no_such_module", "figures.no_such_module"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"rllib_distrl.{name}")


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_every_former_name_leads_somewhere(old):
    new = f"rllib_distrl.{moved.MODULES[old]}"
    # In one step, not from one former name to another.
    assert importlib.util.find_spec(new).name == new
    assert new.removeprefix("rllib_distrl.") not in moved.MODULES
    assert importlib.util.find_spec(f"rllib_distrl.{old}") is not None


def test_explaining_a_builtin_model_imports_no_models_of_transformers():
    """RLlib and torch are needed to validate; these took 2.7 of its 5.9 seconds, and are not."""
    code = (
        "import sys; from pathlib import Path; from rllib_distrl.cli.explain import run_explain\n"
        f"run_explain(Path({str(ROOT / 'configs/countdown/distrl.toml')!r}), [])\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = (
        "transformers.generation.utils transformers.modeling_utils transformers.models.auto "
        "torch._dynamo scipy.stats sklearn matplotlib accelerate numba llvmlite"
    )
    assert not set(heavy.split()) & set(done.stdout.split())
    assert "ray.rllib" in done.stdout.split()
