"""Ray Tune's searchers and schedulers, as a space asks for them."""

from __future__ import annotations

from typing import Any

from rllib_distrl.experiments.space import Space
from rllib_distrl.experiments.trial import ITERATIONS, TOKENS
from rllib_distrl.recipe import Recipe

_REDUCTION = 3  # ASHA keeps the best third at each rung
_NEVER = 10**12  # tokens


def search_algorithm(space: Space, max_concurrent: int) -> Any:
    """The searcher.

    Args:
        space: What to search.
        max_concurrent: Trials at once; 0: no bound. Tune's own `max_concurrent_trials` is ignored
            beside a `BasicVariantGenerator` (Ray 2.60, tune.py:803), so it is set here.

    Raises:
        ValueError: If it is not installed.
    """
    settings = space.settings
    if settings.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=settings.seed, max_concurrent=max_concurrent)
    try:
        import optuna
    except ModuleNotFoundError:
        raise ValueError(
            "search = 'optuna' needs Optuna: pip install 'rllib-distrl[optuna]'. Or choose "
            "search = 'random'."
        ) from None
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = OptunaSearch(seed=settings.seed)
    return ConcurrencyLimiter(searcher, max_concurrent) if max_concurrent else searcher


def scheduler(space: Space, recipe: Recipe) -> Any:
    """The scheduler; "asha" compares trials at equal tokens if they have a budget of them."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    settings = space.settings
    budget = recipe.run.budget_tokens
    if settings.scheduler == "asha":
        longest = budget or recipe.run.iterations
        grace = min(settings.grace_tokens if budget else settings.grace_iterations, longest)
        return ASHAScheduler(
            time_attr=TOKENS if budget else ITERATIONS,
            # The budget ends a trial itself, and may be passed within an iteration.
            max_t=_NEVER if budget else longest,
            grace_period=grace,
            reduction_factor=_REDUCTION,
        )
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=ITERATIONS,
            perturbation_interval=settings.perturbation_interval,
            hyperparam_mutations={"space": space.param_space()},
        )
    return FIFOScheduler()
