"""From the learner's policy to the runners' engines, and the proof that it has arrived."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rllib_distrl.engine.weights import Probe, check_probe, content_hash
from rllib_distrl.method.registry import resolve
from rllib_distrl.model.causal_lm_module import POLICY_PREFIX
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS
from rllib_distrl.rollout.fleet import EnvRunnerFleet
from rllib_distrl.rollout.groups import check_weights
from rllib_distrl.settings import RolloutSettings

logger = logging.getLogger(__name__)

Update = tuple[dict[str, Any], tuple[int, str]]
"""What an env runner's ``set_state`` takes, and the version and hash that it must then report."""


def runner_weights(learner_group: Any, dtype: str = "float32") -> Update:
    """The learner's present weights for env runners.

    Args:
        learner_group: the algorithm's.
        dtype: type in which the engines hold them: [rollout] dtype.

    Returns:
        What an env runner's ``set_state`` takes, and the version and content hash (of large
        tensors the version's sample) that its engine must then report.
    """
    component = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
    state = learner_group.get_state(components=component, inference_only=True)[COMPONENT_LEARNER]
    module_state = state[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
    update = {COMPONENT_RL_MODULE: module_state, WEIGHTS_SEQ_NO: state[WEIGHTS_SEQ_NO]}
    version = state[WEIGHTS_SEQ_NO]
    policy = hugging_face_names(module_state)
    digest = content_hash(policy, dtype=getattr(torch, dtype), sample=version)
    return update, (version, digest)


def hugging_face_names(module_state: dict[str, Any]) -> dict[str, Any]:
    """A module's state reduced to its policy, with Hugging Face's names, as tensors."""
    tensors: Any = convert_to_torch_tensor(module_state)
    return {
        name.removeprefix(POLICY_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(POLICY_PREFIX)
    }


def _policy(update: Update) -> dict[str, torch.Tensor]:
    return hugging_face_names(update[0][COMPONENT_RL_MODULE])


class WeightSync:
    """Keeps the runners of an algorithm at its learner's policy.

    Attributes:
        check_probes: compares what runners compute with what the learner computes.
        fleet: the remote runners.
        latest: the policy as it was last fetched.

    Args:
        learner_group: whose policy it is.
        env_runner_group: whose runners sample with it; none has been told of it yet.
        config: of the algorithm.
        trial_id: of the Tune trial that it is, if it is one.
    """

    latest: Update

    def __init__(
        self, learner_group: Any, env_runner_group: Any, config: Any, trial_id: str | None = None
    ):
        self._learner_group = learner_group
        self._dtype = RolloutSettings.of(config.model_config).dtype
        self._controlled = bool(getattr(config, "controllers", ()))  # stock algorithms have none
        self._learners_stamps: list[Any] = []
        self.local_runner: Any = env_runner_group.local_env_runner
        self.check_probes = ProbeCheck(learner_group, config.model_config, config.sample_timeout_s)
        self.fleet = EnvRunnerFleet(env_runner_group, config, self.check_probes, trial_id)

    @property
    def version(self) -> int:
        """Of the policy that was last fetched."""
        return self.latest[1][0]

    def fetch(self) -> None:
        """Takes the policy from the learner."""
        self.latest = runner_weights(self._learner_group, self._dtype)
        self._learners_stamps = self._stamps()

    def fetch_foreign(self) -> bool:
        """Takes what somebody else has put into the learners' modules since the last `fetch`.

        Returns:
            Whether it is another policy, by every number of it; where the learner lends its
            weights, what they were is not known any more, and they count as others.
        """
        if self._stamps() == self._learners_stamps:
            return False
        version, before = self.version, _policy(self.latest)
        self.fetch()
        after = _policy(self.latest)
        return self.version != version or not all(
            tensor.data_ptr() != before[name].data_ptr() and torch.equal(tensor, before[name])
            for name, tensor in after.items()
        )

    def contents(self) -> tuple[int, str]:
        """Version and hash of the policy that was last fetched, for checkpoints: all of it."""
        dtype = getattr(torch, self._dtype)
        return self.version, content_hash(_policy(self.latest), dtype=dtype)

    def send(self) -> None:
        """Sends the policy to all serving runners, which prove that they have it.

        Raises:
            RuntimeError: a runner has loaded something else, or computes other logps with it.
        """
        update, weights = self.latest
        if self.local_runner is not None:
            self.local_runner.set_state(update)
            if not self.fleet.wanted:
                held = self.local_runner.held_weights()
                check_weights("The local env runner", (held.version, held.hash), weights)
                self.check_probes({"The local env runner": held.probe})
        self.fleet.sync(update, weights)

    def sampling_temperature(self) -> float | None:
        """At which the learners' controllers want the next batch; None: as `[rollout]` says."""
        if not self._controlled:
            return None
        results = self._learner_group.foreach_learner(_temperature_of)
        return next(result.get() for result in results)

    def _stamps(self) -> list[Any]:
        results = self._learner_group.foreach_learner(_stamp_of)
        return [result.get() for result in results]


def _temperature_of(learner: Any) -> Any:
    return getattr(learner, "sampling_temperature", None)


def _stamp_of(learner: Any) -> Any:
    """Changes with the module's weights; RLlib's own learners have none."""
    return getattr(learner, "weights_stamp", None)


def score_probes(learner: Any, *, probes: Sequence[Probe]) -> list[np.ndarray]:
    """Logps (T,) of each probe's tokens under this learner's policy."""
    width = max(len(probe.prompt_ids) + len(probe.tokens) for probe in probes)
    steps = max(len(probe.tokens) for probe in probes)
    ids = torch.zeros(len(probes), width, dtype=torch.long)
    actions = torch.zeros(len(probes), steps, dtype=torch.long)
    mask = torch.zeros(len(probes), steps, dtype=torch.bool)
    for row, probe in enumerate(probes):
        whole = torch.tensor([*probe.prompt_ids, *probe.tokens.tolist()])
        ids[row, : len(whole)] = whole
        actions[row, : len(probe.tokens)] = whole[len(probe.prompt_ids) :]
        mask[row, : len(probe.tokens)] = True
    columns = {
        INPUT_IDS: ids,
        PROMPT_LENS: torch.tensor([len(probe.prompt_ids) for probe in probes]),
        Columns.ACTIONS: actions,
        Columns.LOSS_MASK: mask,
    }
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    device = next(module.parameters()).device
    logps = module.compute_logps({name: x.to(device) for name, x in columns.items()})
    return [row[marked].cpu().numpy() for row, marked in zip(logps, mask, strict=True)]


class ProbeCheck:
    """Lets a learner score the probes of runners that have loaded its weights.

    Attributes:
        error: mean |logp difference| of the worst probe of the last check.

    Args:
        learner_group: the algorithm's.
        model_config: of its module: the types in which engines and learners compute, the coarser
            one of which decides what is tolerated.
        timeout_s: how long the learners may take.
    """

    def __init__(self, learner_group: Any, model_config: Mapping[str, Any], timeout_s: float):
        self._learner_group, self._timeout_s = learner_group, timeout_s
        low = model_config.get("precision") == "bf16"
        self._dtype = "bfloat16" if low else RolloutSettings.of(model_config).dtype
        self.error = 0.0

    def __call__(self, probes: Mapping[str, Probe]) -> None:
        """Checks the probe of each runner, by its name.

        Raises:
            RuntimeError: a runner's logps are not the learner's.
            TimeoutError: no learner has answered.
        """
        if not probes:
            return
        results = self._learner_group.foreach_learner(
            score_probes, probes=list(probes.values()), timeout_seconds=self._timeout_s
        )
        scored = [result.get() for result in results.ignore_errors()]
        if not scored:
            raise TimeoutError(f"No learner has scored the probes within {self._timeout_s:g} s.")
        self.error = max(
            check_probe(name, probe, logps, self._dtype)
            for (name, probe), logps in zip(probes.items(), scored[0], strict=True)
        )


# The 95th percentile of the ratio between sampler and learner that is usual, by the coarser type.
# Our choice, from mean |logp differences| of engines (see `PROBE_TOLERANCE`), not from runs.
_USUAL_RATIO = {"float32": 1.05, "bfloat16": 1.5}


class MismatchWarning:
    """Says once that what samples is not what learns, where nothing explains it.

    Args:
        config: Of the algorithm.
    """

    def __init__(self, config: Any):
        rollout = config.rollout_settings
        # Older weights and cut distributions differ by design.
        stale = rollout.max_staleness or rollout.segment_tokens
        # So does what was sampled hotter, or is learned from again.
        explores = resolve("allocator", config.allocator).name == "explore_filter_replay"
        exact = not stale and not explores and rollout.top_p == 1 and rollout.top_k == 0
        low = "bfloat16" in (rollout.dtype, {"bf16": "bfloat16"}.get(config.precision))
        self._dtype = "bfloat16" if low else "float32"
        self._said = not exact

    def __call__(self, ratio: float) -> None:
        """Warns if a ratio, `logp_mismatch_p95`, is far outside its usual range."""
        usual = _USUAL_RATIO[self._dtype]
        if self._said or ratio <= usual:
            return
        self._said = True
        logger.warning(
            "WHAT SAMPLES IS NOT WHAT LEARNS: before the first step probabilities differ by a "
            "factor of %.3g at one token in twenty; in %s at most %g is usual. Every gradient is "
            "biased by it. Look at logp_mismatch_p95; [rollout] dtype = 'float32' and another "
            "engine tell whether rounding is the cause, importance_correction = 'truncated' "
            "corrects for it.",
            ratio,
            self._dtype,
            usual,
        )
