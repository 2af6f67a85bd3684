"""What `DistRLConfig.validate()` refuses."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray.rllib.utils.schedules.scheduler import Scheduler

from rllib_distrl.algorithm.cluster import check_runner_gpus
from rllib_distrl.algorithm.export import check_export
from rllib_distrl.algorithm.unread_settings import check_all_settings_are_read
from rllib_distrl.algorithm.wiring import check_model_config, check_rate, check_window
from rllib_distrl.learner.step import lr_factor, lr_schedule_settings
from rllib_distrl.method.allocators import EQUAL
from rllib_distrl.method.branching import NONE
from rllib_distrl.method.critic import make_head
from rllib_distrl.method.loss_terms import TEMPERATURE
from rllib_distrl.method.pipeline import OPTIMISM, Method
from rllib_distrl.method.registry import Stage, resolve, smallest_group
from rllib_distrl.model.causal_lm import without_weights
from rllib_distrl.model.critics import check_critic
from rllib_distrl.model.loading import load_config
from rllib_distrl.model.lora import check_lora
from rllib_distrl.model.sharding import blocks_of
from rllib_distrl.recipe_schema import nearest
from rllib_distrl.rllib_traps import given_model_config
from rllib_distrl.settings import (
    CRITIC_TRUNKS,
    DistanceSettings,
    EnsembleSettings,
    PretrainingSettings,
    RolloutSettings,
    TrainingSettings,
)


def check_attributes(config: Any) -> None:
    """Refuses what `update_from_dict` and plain assignments have added: nobody reads it.

    Raises:
        ValueError: with what to use.
    """
    known = vars(type(config)())
    public = [name for name in known if not name.startswith("_")]
    # RLlib leaves `class` behind when it copies a configuration (Ray 2.60).
    for name in vars(config).keys() - known.keys() - {"class"}:
        if name.startswith("__"):  # Tune's own, such as `__stderr_file__`.
            continue
        if name in RolloutSettings.model_fields:
            hint = f"Use rollout({name}=...)."
        else:
            hint = f"Did you mean {nearest(name, public)!r}?"
        raise ValueError(f"The configuration has no setting {name!r}. {hint}")


def take_settings(config: Any) -> None:
    """Checks the types and bounds of ``config``'s settings and makes Python's values of them.

    Raises:
        ValueError: for the first one that is refused.
    """
    checked = TrainingSettings.of(config)
    for name in TrainingSettings.model_fields:
        value = getattr(checked, name)
        if not isinstance(value, BaseModel):
            setattr(config, name, value)
    config.rl_module(model_config=given_model_config(config))


def validate_distrl(config: Any) -> None:
    """Checks the settings of the method, of sampling and of batches.

    Raises:
        ValueError: for the first setting that is out of bounds or fits no other.
    """
    config.rollout_settings.check_machine()
    _check_model(config)
    _check_overlap(config)
    if not 0 <= config.gamma <= 1:
        raise ValueError(f"gamma is {config.gamma}; it must lie in [0, 1].")
    if config.grad_clip is not None and config.grad_clip <= 0:
        raise ValueError(f"grad_clip is {config.grad_clip}; it must be above 0, or left out.")
    Scheduler.validate(
        fixed_value_or_schedule=config.entropy_coeff,
        setting_name="entropy_coeff",
        description="entropy coefficient",
    )
    if config.num_epochs < 1:
        raise ValueError(f"num_epochs is {config.num_epochs}; it must be >= 1.")
    _check_head(config)
    _check_critic_checkpoint(config)
    _check_learning_rates(config)
    _check_pretraining(config)
    _check_method(config)
    _check_batches(config)
    _check_sharding(config)
    _check_runners(config)
    _check_dynamic_sampling(config)
    _check_segments(config)
    _check_branching(config)
    _check_stages(config)
    check_all_settings_are_read(config)


def _check_model(config: Any) -> None:
    settings = given_model_config(config)
    model = settings.get("model")
    if not model:
        raise ValueError(
            "No model is named. Use rl_module(model_config={'model': 'builtin:countdown'}) or "
            "the path or id of a Hugging Face causal language model ([run] model in a recipe)."
        )
    if taken := sorted(set(settings) & set(config._model_config_auto_includes)):
        raise ValueError(
            f"rl_module(model_config=...) has {', '.join(taken)}, which would contradict what the "
            "rest of the configuration says. Use training(), rollout() or debugging() for it "
            "([training], [rollout] or [debugging] in a recipe)."
        )
    check_model_config(config)
    check_window(model, config.rollout_settings.max_completion_tokens)
    check_export(model)
    if lora := settings.get("lora"):
        check_lora(lora, load_config(model))
        if config.critic_checkpoint is not None:
            raise ValueError(
                "critic_checkpoint holds a whole trunk, but with lora the critic is adapters on "
                "the policy's frozen weights. Leave out one of them."
            )
    rollout = config.rollout_settings
    kept = rollout.top_p == 1 and rollout.top_k == 0
    if not kept and config.importance_correction == "none":
        raise ValueError(
            f"[rollout] top_p={rollout.top_p}, top_k={rollout.top_k} would sample from another "
            "distribution than the one that learns. Train with top_p=1 and top_k=0, or set "
            "importance_correction to 'truncated' or 'masked'; evaluate with any."
        )


def _check_overlap(config: Any) -> None:
    if config.in_evaluation:  # Evaluation may run in this process, and trains nothing.
        return
    staleness = config.rollout_settings.max_staleness
    if staleness and not config.num_env_runners:
        raise ValueError(
            f"[rollout] max_staleness={staleness} lets runners sample while the learner learns, "
            f"but num_env_runners is {config.num_env_runners}: sampling and learning share this "
            "process. Set num_env_runners >= 1 in [env_runners], or max_staleness = 0."
        )


def _check_critic_checkpoint(config: Any) -> None:
    if config.critic_checkpoint is None:
        return
    if config.critic not in CRITIC_TRUNKS:
        raise ValueError(
            f"critic_checkpoint brings a trunk of its own, but critic is {config.critic!r}. "
            "Set critic = 'separate' or 'twin', or leave critic_checkpoint out."
        )
    check_critic(
        config.critic_checkpoint,
        head=config.head,
        n_quantiles=config.n_quantiles,
        head_center=config.head_center,
        critic_observation=config.critic_observation,
        critic=config.critic,
    )


def _check_head(config: Any) -> None:
    if config.critic == "none":
        return
    head = make_head(TrainingSettings.of(config).to_dict())
    support = () if head.from_data else head.support
    value = config.init_value
    if support and value is not None and not support[0] <= value <= support[-1]:
        raise ValueError(
            f"init_value is {value}, but the laws of head {config.head!r} lie within "
            f"[{support[0]:g}, {support[-1]:g}]. Choose one there, or another head."
        )


def _check_learning_rates(config: Any) -> None:
    settings = lr_schedule_settings(TrainingSettings.of(config))
    changes = config.lr_schedule != "constant" or config.lr_warmup_iterations > 0
    if changes and not isinstance(config.lr, (int, float)):
        raise ValueError(
            f"lr is {config.lr}, which is a schedule already. Give one number with "
            "lr_schedule and lr_warmup_iterations, or leave these out."
        )
    check_rate("lr", config.lr)
    lr_factor(config.lr_warmup_iterations + 1, **settings)


def _check_pretraining(config: Any) -> None:
    if config.critic_pretraining is None:
        return
    settings = PretrainingSettings(**config.critic_pretraining)
    if settings.lr is None and not isinstance(config.critic_lr or config.lr, (int, float)):
        raise ValueError(f"lr is {config.lr}: critic_pretraining needs one number, its own lr.")
    if settings.samples is not None and not Path(settings.samples).exists():
        raise ValueError(
            f"critic_pretraining.samples is {settings.samples!r}, which is no file or folder."
        )
    if settings.samples is not None and config.critic_observation == "stock":
        raise ValueError(
            "critic_pretraining.samples holds scores, and critic_observation = 'stock' is made of "
            "the rewards before them. Use critic_pretraining.rollouts."
        )
    per_iteration = config.rollout_settings.episodes_per_iteration
    if settings.rollouts % per_iteration:
        raise ValueError(
            f"critic_pretraining.rollouts is {settings.rollouts}, but {per_iteration} completions "
            "are sampled at a time (prompts_per_iteration x num_generations). Use a multiple."
        )
    reads_logps = any(
        "ref_logp" in resolve("reward", spec).needs for spec in config.reward_transforms
    )
    if settings.samples is not None and reads_logps:
        raise ValueError(
            "A reward transform reads the sampler's logps, which samples do not hold. Use "
            "critic_pretraining.rollouts instead of samples."
        )


def _check_method(config: Any) -> None:
    if config.critic == "none" and config.bonus_coeff > 0:
        raise ValueError(
            f"bonus_coeff is {config.bonus_coeff}, but there is no critic to give a bonus. "
            "Set bonus_coeff = 0 or choose a critic."
        )
    if config.critic == "none" and config.critic_warmup_iterations > 0:
        raise ValueError(
            f"critic_warmup_iterations is {config.critic_warmup_iterations}, but there is no "
            "critic. Set it to 0."
        )
    if config.critic_epochs is not None and config.critic_epochs < config.num_epochs:
        raise ValueError(
            f"critic_epochs is {config.critic_epochs}, but num_epochs is {config.num_epochs}: the "
            "critic learns in each pass of the policy. Set it to num_epochs or more, or leave it "
            "out."
        )
    if config.critic_freeze != "none" and config.model_config.get("lora"):
        raise ValueError(
            f"critic_freeze is {config.critic_freeze!r}, but with lora only the adapters of the "
            "critic's trunk are trained. Leave one of them out."
        )
    if config.critic_observation == "text" and config.critic in ("shared", "detached"):
        raise ValueError(
            f"critic_observation is 'text', but critic is {config.critic!r}: the policy's trunk "
            "would read what only the critic may see. Set critic = 'separate', or "
            "critic_observation = 'state'."
        )
    if config.critic_observation == "stock" and config.gamma != 1.0:
        raise ValueError(
            f"critic_observation is 'stock', the undiscounted return so far, but gamma is "
            f"{config.gamma}. Set gamma = 1.0, or leave critic_observation out."
        )
    EnsembleSettings(**config.ensemble)
    DistanceSettings(**config.distance)
    of_quantiles = "quantiles" in resolve("bonus_statistic", config.bonus_stat).needs
    if config.n_quantiles == 1 and config.bonus_coeff > 0 and of_quantiles:
        raise ValueError(
            f"bonus_coeff is {config.bonus_coeff}, but one quantile has no spread. "
            "Set bonus_coeff = 0, n_quantiles >= 2, or bonus_stat = 'ensemble' or 'distance'."
        )
    target = resolve("target", config.target).name
    if config.quantile_loss == "matched" and target == "sample_replacement":
        raise ValueError(
            "quantile_loss='matched' needs a target per quantile, but sample_replacement gives "
            "particles. Use quantile_loss='pairwise'."
        )
    if config.bonus_schedule == "linear" and config.bonus_horizon is None:
        raise ValueError("bonus_schedule='linear' needs bonus_horizon, its number of iterations.")


def _check_batches(config: Any) -> None:
    rollout = config.rollout_settings
    learners = max(config.num_learners or 0, 1)
    if rollout.prompts_per_iteration % learners:
        raise ValueError(
            f"prompts_per_iteration={rollout.prompts_per_iteration} does not divide among "
            f"num_learners={config.num_learners}: every learner needs the same number of whole "
            f"groups. Use a multiple of {learners}."
        )
    per_learner = rollout.episodes_per_iteration // learners
    size = config.minibatch_size
    if size is not None and (size < 1 or size > per_learner or per_learner % size):
        raise ValueError(
            f"minibatch_size={size} does not divide the {per_learner} sequences that each "
            f"learner gets per iteration ({rollout.prompts_per_iteration} prompts x "
            f"{rollout.num_generations} completions / {learners} learner(s)). "
            "minibatch_size counts sequences; leave it out for one minibatch."
        )
    budget = config.micro_batch_tokens
    if budget != "auto" and budget <= rollout.max_completion_tokens:
        raise ValueError(
            f"micro_batch_tokens={budget} cannot hold one sequence: a "
            f"completion alone may have {rollout.max_completion_tokens} tokens. Raise it."
        )


def _check_sharding(config: Any) -> None:
    if config.sharding == "none":
        return
    what = f"sharding is {config.sharding!r}"
    if config.num_learners < 2:
        raise ValueError(
            f"{what}, but num_learners is {config.num_learners}: one learner holds everything "
            "anyway. Set num_learners >= 2 in [learners], or leave sharding out."
        )
    if Method.from_config(config).imitates:
        raise ValueError(
            f"{what}, but policy_loss is {config.policy_loss!r}: learners would not all have "
            "solutions to imitate at the same time. Leave one of them out."
        )
    if not blocks_of(without_weights(load_config(config.model_config["model"]))):
        raise ValueError(
            f"{what}, but Transformers marks no blocks of {config.model_config['model']!r}, so "
            "the model would be gathered whole. Leave sharding out."
        )


def _check_dynamic_sampling(config: Any) -> None:
    if config.max_sampling_rounds == 1:
        return
    rollout = config.rollout_settings
    if rollout.num_generations < 2:
        raise ValueError(
            f"max_sampling_rounds is {config.max_sampling_rounds}, but a group of one always has "
            "equal returns. Set max_sampling_rounds = 1, or [rollout] num_generations >= 2."
        )
    if rollout.max_staleness:
        raise ValueError(
            f"max_sampling_rounds is {config.max_sampling_rounds}, but with [rollout] "
            f"max_staleness = {rollout.max_staleness} a batch is sampled before it is known what "
            "is missing. Set one of them to its default (1 and 0)."
        )


def _check_segments(config: Any) -> None:
    rollout = config.rollout_settings
    if not rollout.segment_tokens:
        return
    what = f"[rollout] segment_tokens is {rollout.segment_tokens}"
    if rollout.segment_tokens >= rollout.max_completion_tokens:
        raise ValueError(
            f"{what}, and no completion is longer than max_completion_tokens = "
            f"{rollout.max_completion_tokens}: nothing would ever go on in the next iteration. "
            "Choose a smaller number, or 0."
        )
    if rollout.max_staleness > 1:
        raise ValueError(
            f"{what}, but with max_staleness = {rollout.max_staleness} the batch after the next "
            "begins before it is known which rows go on in it. Set max_staleness = 1, or "
            "segment_tokens = 0."
        )
    if config.max_sampling_rounds != 1:
        raise ValueError(
            f"{what}, but max_sampling_rounds = {config.max_sampling_rounds} fills each batch up "
            "with groups that are whole in the same iteration. Set max_sampling_rounds = 1, or "
            "segment_tokens = 0."
        )
    if resolve("allocator", config.allocator).name != EQUAL:
        raise ValueError(
            f"{what}, but allocator {config.allocator['name']!r} decides anew how many completions "
            "a prompt gets, and those of open prompts have begun. Set allocator = 'equal', or "
            "segment_tokens = 0."
        )
    if any(
        getattr(resolve("controller", spec)(), "setting", None) == TEMPERATURE
        for spec in config.controllers
    ):
        raise ValueError(
            f"{what}, but a controller moves the temperature: the tokens of a completion would be "
            "sampled with several. Leave the controller out, or set segment_tokens = 0."
        )
    if (config.critic_pretraining or {}).get("rollouts"):
        raise ValueError(
            f"{what}, but critic_pretraining.rollouts counts completions that are sampled to "
            "their end at once. Use critic_pretraining.samples, or set segment_tokens = 0."
        )


def _check_branching(config: Any) -> None:
    stage = resolve("branching", config.branching)
    if stage.name == NONE:
        return
    stage()  # Checks settings' bounds.
    what, rollout = f"branching is {stage.name!r}", config.rollout_settings
    if smallest_group(config) < 2:
        raise ValueError(
            f"{what}, but a group of one has nothing to branch from. Set [rollout] "
            "num_generations >= 2, or branching = 'none'."
        )
    if rollout.segment_tokens:
        raise ValueError(
            f"{what}, but with [rollout] segment_tokens = {rollout.segment_tokens} no completion "
            "is whole when others branch off from it. Set one of them to its default."
        )
    if rollout.engine != "torch":
        raise ValueError(
            f"{what}, which reads entropies, but [rollout] engine {rollout.engine!r} reports none. "
            "Set engine = 'torch', or branching = 'none'."
        )


def check_branching_fits(config: Any, env: Any) -> None:
    """Refuses a task in which there is no place to branch.

    Args:
        config: The algorithm's.
        env: The `TokenEnv`.

    Raises:
        ValueError: Naming the task.
    """
    name = resolve("branching", config.branching).name
    if name != NONE and not env.has_turns:
        raise ValueError(
            f"branching is {name!r}, but the task {env.task.name!r} never replies: there is no "
            "place to branch. Set branching = 'none', or choose a task that replies."
        )


def _check_runners(config: Any) -> None:
    check_runner_gpus(config)
    limit = config.rollout_settings.max_env_runners
    if limit and config.num_env_runners > limit:
        raise ValueError(
            f"num_env_runners={config.num_env_runners} exceeds [rollout] max_env_runners={limit}. "
            "Raise the limit or lower the number."
        )
    if config.num_consecutive_env_runner_failures_tolerance < 1:
        raise ValueError(
            "num_consecutive_env_runner_failures_tolerance is "
            f"{config.num_consecutive_env_runner_failures_tolerance}; it must be >= 1: the tries "
            "in a row that may complete nothing of a batch."
        )


def _check_stages(config: Any) -> None:
    _check_named_once(config)
    _check_allocator(config)
    method = Method.from_config(config)
    read_out = [] if config.critic == "none" else [method.read_out]
    for stage in (*method.stages, *method.controllers, *read_out):
        _check_needs(stage, config)
        stage.check_fits(config)
    _check_controllers(config)
    sampler = resolve("prompt_sampler", config.prompt_sampler)(1, 0)  # Checks settings' bounds.
    if not hasattr(sampler, "next"):
        raise ValueError(
            f"prompt_sampler {config.prompt_sampler!r} makes a {type(sampler).__name__}, which has "
            "no next(n). docs/tasks.md says what a sampler is."
        )


def _check_allocator(config: Any) -> None:
    """What holds with groups of one size alone."""
    stage = resolve("allocator", config.allocator)
    made = stage(config.rollout_settings.num_generations, 0)
    for name in ("allocate", "least"):
        if not hasattr(made, name):
            raise ValueError(
                f"allocator {config.allocator!r} has no {name!r}. Name a class like `SqrtVariance` "
                "in rllib_distrl/method/allocators.py."
            )
    stage.check_fits(config)
    if stage.name == EQUAL:
        return
    alone = "makes groups of different sizes, and"
    if (config.num_learners or 0) > 1:
        raise ValueError(
            f"allocator {stage.name!r} {alone} every one of num_learners={config.num_learners} "
            "needs as many sequences. Set num_learners to 0 or 1, or allocator = 'equal'."
        )
    if config.max_sampling_rounds > 1:
        raise ValueError(
            f"allocator {stage.name!r} {alone} max_sampling_rounds={config.max_sampling_rounds} "
            "fills a batch with groups of one size. Set max_sampling_rounds = 1, or allocator = "
            "'equal'."
        )
    if config.minibatch_size and Method.from_config(config).keeps_groups_whole:
        raise ValueError(
            f"allocator {stage.name!r} {alone} policy_loss {config.policy_loss['name']!r} needs "
            f"whole groups in minibatches of minibatch_size={config.minibatch_size}. Leave "
            "minibatch_size out, or set allocator = 'equal'."
        )


def _check_named_once(config: Any) -> None:
    for setting in ("reward_transforms", "shapers", "regularisers"):
        chosen = [spec.get("name") for spec in getattr(config, setting)]
        for name in chosen:
            if chosen.count(name) > 1:
                raise ValueError(
                    f"{setting} names {name!r} {chosen.count(name)} times. Keep one of them."
                )
    if any(spec.get("name") == OPTIMISM["name"] for spec in config.shapers):
        own = next(s for s in config.shapers if s.get("name") == OPTIMISM["name"])
        if config.bonus_coeff > 0:
            raise ValueError(
                f"shapers names 'dltv', which bonus_coeff = {config.bonus_coeff} adds by itself: "
                "the bonus would count twice. Leave it out of shapers, or set bonus_coeff = 0 in "
                "[training] to give it a place and a bonus_coeff of its own there."
            )
        if not own.get("bonus_coeff", 0.0) > 0:
            raise ValueError(
                "shapers names 'dltv' with no bonus: bonus_coeff is 0. Set bonus_coeff in "
                "[training] and leave it out of shapers, or give it a bonus_coeff above 0 there."
            )


def _check_needs(stage: Stage, config: Any) -> None:
    what = f"{stage.method.kind} {stage.name!r}"
    if config.critic == "none" and stage.needs & {"quantiles", "values"}:
        raise ValueError(
            f"{what} reads the critic, but critic is 'none'. Choose a critic, or a method that "
            "does without, such as advantage 'grpo'."
        )
    if stage.method.kind == "advantage" and "groups" in stage.needs and config.gamma != 1.0:
        raise ValueError(
            f"{what} compares returns of whole completions, which are not discounted, but gamma "
            f"is {config.gamma}. Set gamma = 1.0, or use advantage 'gae' or 'reinforce_pp'."
        )
    group = smallest_group(config)
    if "groups" in stage.needs and group < 2:
        equal = resolve("allocator", config.allocator).name == EQUAL
        raise ValueError(
            f"{what} compares the completions of a prompt, but "
            + (
                f"num_generations is {group}. Set [rollout] num_generations >= 2."
                if equal
                else f"the allocator's n_min is {group}. Set n_min >= 2."
            )
        )


def _check_controllers(config: Any) -> None:
    controllers = [resolve("controller", spec)() for spec in config.controllers]
    for spec, controller in zip(config.controllers, controllers, strict=True):
        if not hasattr(controller, "setting"):
            raise ValueError(
                f"controller {spec['name']!r} makes a {type(controller).__name__}, which names no "
                "setting to move. Name a class like `AdaptiveEntropy` in rllib_distrl/method/"
                "loss_terms.py."
            )
    moved = [controller.setting for controller in controllers]
    for setting in moved:
        if moved.count(setting) > 1:
            raise ValueError(f"Two controllers move {setting}. Keep one of them.")
        if setting == TEMPERATURE:  # It starts at the recipe's.
            continue
        loss = Method.from_config(config).policy_loss
        if getattr(config, setting) != getattr(type(config)(), setting) or setting in loss.given:
            raise ValueError(
                f"{setting} is set, but a controller moves it. "
                f"Remove {setting}; the controller's own settings say where it starts."
            )
        if setting != "entropy_coeff" and setting not in loss.method.settings():
            raise ValueError(
                f"A controller moves {setting}, which policy_loss {loss.name!r} does not have. "
                "Choose one that has it, such as 'clip', or leave the controller out."
            )
