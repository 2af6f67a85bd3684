"""Private names of other libraries: all that we reach are listed and exist. RLlib's traps."""

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import rllib_distrl
from rllib_distrl import RolloutSettings, wire_language_model
from rllib_distrl.algorithm.registry import algorithm_config
from rllib_distrl.rllib_traps import PRIVATE_NAMES, optimizer_steps
from rllib_distrl.rollout.completion_env_runner import CompletionEnvRunner
from tests.helpers import COUNTDOWN, TINY, distrl_config

ROOT = Path(rllib_distrl.__file__).parent
LIBRARIES = {"gymnasium", "ray", "torch", "transformers"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_on_self(tree):
    """What a class's methods read or set on `self`, and the methods themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.FunctionDef):
            yield node.name


@cache
def names_in(cls):
    """Names of a class and of its instances, those of its bases included."""
    found = set(dir(cls))
    for base in foreign(cls):
        try:
            source = inspect.getsource(base)
        except OSError:  # written in C
            continue
        found |= set(names_on_self(ast.parse(textwrap.dedent(source))))
    return found


def foreign(cls):
    """The classes of other libraries among a class and its bases."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]


def has(place, name):
    module, _, path = place.partition(":")
    owner = import_module(module)
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part)
    return name in names_in(owner) if inspect.isclass(owner) else hasattr(owner, name)


@pytest.mark.parametrize("place", PRIVATE_NAMES)
def test_what_we_reach_of_other_libraries_is_still_there(place):
    library = place.partition(".")[0]
    gone = [name for name in PRIVATE_NAMES[place] if not has(place, name)]
    assert not gone, (
        f"{library} {version(library)} has no {', '.join(gone)} in {place} any more. It is private "
        "to that library, and rllib_distrl relies on it: `grep -rn` for the name in rllib_distrl/, "
        "read what takes its place in the new version, and change rllib_traps.PRIVATE_NAMES."
    )


def trees():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def reached() -> Iterator[tuple[str, str]]:
    """(file, private name) of all attributes and imports whose name the package does not define."""
    own = {"_exit", "_initializing"}  # os._exit is public; the other is that of Python's imports
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if ast.unparse(node.value) == "self" else set()
    for path, tree in trees():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                names = [name for name in names if isinstance(name, str)]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((str(path), name) for name in names if is_private(name) and name not in own)


def listed():
    names = {name for names in PRIVATE_NAMES.values() for name in names}
    return names | {part for place in PRIVATE_NAMES for part in place.split(":")[0].split(".")}


def test_all_private_names_that_are_reached_are_listed():
    unlisted = sorted({(path, name) for path, name in reached() if name not in listed()})
    assert not unlisted, "Use a public name, or list it in rllib_traps.PRIVATE_NAMES, with the why."


def test_all_private_modules_are_listed():
    """Each by itself: what is public in one of them is private all the same."""
    listed = {place.partition(":")[0] for place in PRIVATE_NAMES}
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            module = getattr(node, "module", None) or ""
            names = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            private = {name for name in names if any(map(is_private, name.split(".")[:-1]))}
            assert not private or private <= listed or module in listed, (path, private - listed)


def test_all_private_names_that_are_inherited_are_listed():
    unlisted = set()
    for found in pkgutil.walk_packages([str(ROOT)], "rllib_distrl."):
        if "vllm" in found.name or found.name.endswith("__main__"):
            continue  # vLLM is not installed everywhere
        module = import_module(found.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != found.name:
                continue
            theirs = set().union(*map(names_in, foreign(cls)))
            body = ast.parse(textwrap.dedent(inspect.getsource(cls)))
            used = {name for name in names_on_self(body) if is_private(name) and name in theirs}
            unlisted |= {(cls.__name__, name) for name in used - listed()}
    assert not unlisted, "Use a public name, or list it in rllib_traps.PRIVATE_NAMES."


def test_steps_are_minibatches_times_epochs_and_survive_a_checkpoint(ray_session, build, tmp_path):
    # 4 prompts x 2 completions in minibatches of 4, twice: four steps an iteration.
    config = distrl_config(minibatch_size=4, num_epochs=2)
    algo = build(config.copy())
    assert optimizer_steps(algo) is None
    for iteration in (1, 2):
        algo.train()
        assert optimizer_steps(algo) == 4 * iteration
    folder = algo.save_to_path(str(tmp_path / "checkpoint"))
    again = build(config.copy())
    again.restore_from_path(folder)
    again.train()
    assert optimizer_steps(again) == 12


@pytest.mark.slow
@pytest.mark.parametrize("learners", [0, 1])
def test_steps_of_rllibs_own_ppo(ray_session, build, learners):
    rollout = RolloutSettings(num_generations=2, max_completion_tokens=24)
    config = algorithm_config("PPO").environment(COUNTDOWN).debugging(seed=1)
    config.env_runners(num_env_runners=0).learners(num_learners=learners)
    config.training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=2)
    algo = build(wire_language_model(config, TINY, rollout))
    trained = algo.train()["learners"]["default_policy"]["num_module_steps_trained"]
    # The last minibatch of an epoch is not full.
    assert optimizer_steps(algo) == -(-trained // 64) > 2


def test_a_seed_makes_pytorch_deterministic_and_fills_no_memory():
    """The canary: a newer RLlib that no longer sets this needs no `leave_memory_unfilled`."""
    runner = CompletionEnvRunner(config=distrl_config())
    assert runner.config.seed is not None and torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
