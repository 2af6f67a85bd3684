"""Ray Tune's searchers and schedulers, as a space asks for them."""

from __future__ import annotations

from typing import Any

from rllib_distrl.recipe import Recipe
from rllib_distrl.sweeps.space import Space
from rllib_distrl.sweeps.trial import ITERATIONS

_REDUCTION = 3  # ASHA keeps the best third at each rung
_NEVER = 1_000_000_000  # iterations; where only a budget of tokens ends trials


def search_algorithm(space: Space) -> Any:
    """The searcher.

    Raises:
        ValueError: If it is not installed.
    """
    settings = space.settings
    if settings.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=settings.seed)
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError(
            "search = 'optuna' needs Optuna: pip install 'rllib-distrl[optuna]'. Or choose "
            "search = 'random'."
        ) from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(seed=settings.seed)


def scheduler(space: Space, recipe: Recipe) -> Any:
    """The scheduler; trials are compared at equal iterations."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    settings = space.settings
    longest = _NEVER if recipe.run.budget_tokens else recipe.run.iterations
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr=ITERATIONS,
            max_t=max(longest, settings.grace_iterations),
            grace_period=settings.grace_iterations,
            reduction_factor=_REDUCTION,
        )
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=ITERATIONS,
            perturbation_interval=settings.perturbation_interval,
            hyperparam_mutations={"space": space.param_space()},
        )
    return FIFOScheduler()
