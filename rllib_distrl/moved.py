"""Modules under the names that they had before: old imports, pickles and checkpoints load.

A name below is looked up where the module is now, with a `DeprecationWarning`. CHANGELOG has the
same table for readers.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = {
    "algorithms": "algorithm",
    "comparison": "experiments",
    "connectors": "learner",
    "engines": "engine",
    "env_runners": "rollout",
    "learners": "learner",
    "models": "model",
    "modules": "model",
    "stages": "method",
    "sweeps": "experiments",
}
# Modules whose own name changed, or that are in a package now.
MODULES = {
    "algorithm.group_baselines": "algorithm.presets",
    "algorithm.sao": "algorithm.presets",
    "algorithms.distrl_config": "algorithm.distrl",
    "algorithms.distrl_validation": "algorithm.validation",
    "algorithms.dynamic_sampling": "algorithm.batches",
    "algorithms.env_runner_fleet": "rollout.fleet",
    "algorithms.fresh_batches": "algorithm.batches",
    "algorithms.group_baselines": "algorithm.presets",
    "algorithms.language_model": "algorithm.wiring",
    "algorithms.learner_shards": "rollout.groups",
    "algorithms.optimizer_steps": "rllib_traps",
    "algorithms.probe_check": "algorithm.weight_sync",
    "algorithms.sampling": "rollout.groups",
    "algorithms.validation_clock": "rollout.pool_metrics",
    "checkpoints": "runs.checkpoints",
    "cli.checks": "cli.explain",
    "cli.critic": "cli.checkpoints",
    "cli.disk": "cli.explain",
    "cli.errors": "cli.session",
    "cli.estimates": "algorithm.estimates",
    "cli.eval_data": "cli.eval",
    "cli.eval_progress": "cli.display",
    "cli.export": "cli.checkpoints",
    "cli.goal": "experiments.training",
    "cli.interrupts": "cli.session",
    "cli.measure": "cli.display",
    "cli.methods": "cli.explain",
    "cli.problems": "cli.explain",
    "cli.quiet": "cli.session",
    "cli.ray_session": "cli.session",
    "cli.report": "cli.pages",
    "cli.results": "cli.display",
    "cli.training_checkpoints": "experiments.training",
    "cli.training_loop": "cli.train",
    "cli.training_session": "cli.train",
    "cli.view": "cli.pages",
    "comparison.claims": "experiments.decisions",
    "comparison.drawing": "experiments.figures",
    "comparison.execution": "experiments.comparison",
    "comparison.matched": "experiments.decisions",
    "comparison.outputs": "experiments.pages",
    "comparison.processes": "experiments.comparison",
    "connectors.sequences_from_episodes": "learner.connector",
    "engines.engine": "engine.protocol",
    "engines.handshake": "engine.weights",
    "engines.paged_cache": "engine.compiled_decoder",
    "env_runners.pools": "rollout.pool_metrics",
    "evaluation.plots": "figures",
    "evaluation.presets": "evaluation.data",
    "evaluation.run": "evaluation.evaluate",
    "evaluation.settings": "settings",
    "evaluation.store": "evaluation.result",
    "evaluation.summary": "evaluation.measures",
    "experiments.equal_average": "experiments.decisions",
    "experiments.plan": "experiments.comparison",
    "experiments.record": "experiments.results",
    "experiments.space": "experiments.trials",
    "experiments.tables": "experiments.pages",
    "experiments.trial": "experiments.trials",
    "figures.look": "figures",
    "figures.pass_k": "figures",
    "learner.optimizers": "learner.step",
    "learners.before_update": "learner.batch_pass",
    "learners.controllers": "method.loss_terms",
    "learners.importance": "learner.connector",
    "learners.losses": "learner.step",
    "learners.method": "method.pipeline",
    "learners.probes": "algorithm.weight_sync",
    "learners.read_critic": "learner.metrics",
    "learners.refusals": "learner.step",
    "learners.update_metrics": "learner.metrics",
    "maths.aggregation": "maths.losses",
    "maths.best_of_k": "maths.laws",
    "maths.contrastive_losses": "maths.group_losses",
    "maths.distance": "maths.optimism",
    "maths.group_calibration": "maths.group_advantages",
    "maths.kl": "maths.losses",
    "maths.lr_schedule": "learner.step",
    "maths.majority": "maths.choosing",
    "maths.micro_batches": "maths.packing",
    "maths.novelty": "maths.group_advantages",
    "maths.packed_attention": "maths.packing",
    "maths.read_outs": "maths.quantiles",
    "maths.targets": "maths.advantages",
    "method.formula": "method.batch",
    "method.heads": "method.critic",
    "method.imitation": "method.policy_losses",
    "method.prompt_weights": "method.shapers",
    "model.attention": "model.causal_lm",
    "model.cached_folder": "files",
    "model.token_texts": "algorithm.inspection",
    "models.lm_parts": "model.causal_lm",
    "models.warm_start": "model.builtin",
    "modules.activations": "model.causal_lm",
    "modules.critic_folder": "model.critics",
    "modules.distributions": "model.sequences",
    "modules.distrl_module": "model.causal_lm_module",
    "modules.ensemble": "model.critics",
    "modules.packing": "model.causal_lm",
    "recipe_paths": "recipe",
    "run_folder": "runs.folder",
    "run_log": "runs.log",
    "run_meta": "runs.log",
    "run_requests": "cli.scale",
    "run_storage": "runs.storage",
    "runs.trackers": "runs.log",
    "stages.best_of_k": "method.advantages",
    "stages.controllers": "method.loss_terms",
    "stages.covariance_losses": "method.policy_losses",
    "stages.difficulty": "method.shapers",
    "stages.read_outs": "method.critic",
    "stages.regularisers": "method.loss_terms",
    "sweeps.fronts": "experiments.sweep",
    "sweeps.search": "experiments.trials",
    "token_table": "method.token_table",
    "trackers": "runs.log",
    "viewer.charts": "figures",
    "viewer.critic_plots": "viewer.plots",
    "viewer.packing": "viewer.token_page",
    "viewer.page": "viewer.token_page",
    "viewer.report": "viewer.run_report",
    "viewer.token_blocks": "viewer.token_page",
    "viewer.training_plots": "viewer.plots",
}


def new_name(name: str) -> str | None:
    """Where ``name``, below this package, is now; None where nothing of that name was moved."""
    if name in MODULES:
        return MODULES[name]
    package, _, rest = name.partition(".")
    if package not in PACKAGES:
        return None
    return f"{PACKAGES[package]}.{rest}" if rest else PACKAGES[package]


class _Loader(Loader):
    def __init__(self, name: str):
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is {self._name} now.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It ran under its own name; Python has just given it the old name's spec.
        module.__spec__ = self._spec


class MovedModules(MetaPathFinder):
    """Finds what `import rllib_distrl.OLD` asks for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for names of the table, None for all others."""
        root, _, rest = fullname.partition(".")
        if root != __package__ or (new := new_name(rest)) is None:
            return None
        return ModuleSpec(fullname, _Loader(f"{root}.{new}"), is_package=True)


def install() -> None:
    """Called once, when the package is imported.

    Before Python's own finders: these would run a moved package's modules a second time.
    """
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
