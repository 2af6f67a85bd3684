"""The `[rollout]` table: how completions are sampled, for our algorithms and stock ones."""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

ENGINES = ("torch", "vllm")
_NO_VLLM = (
    "[rollout] engine is 'vllm', but vLLM is not installed here. On a machine with a GPU: "
    "pip install 'rllib-distrl[vllm]'. On CPU it needs an environment of its own: see "
    "docs/vllm.md. Or use engine = 'torch'."
)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RolloutSettings:
    """How prompts become completions.

    Attributes:
        engine: what generates: ``"torch"`` or ``"vllm"``.
        engine_options: further arguments of the vLLM engine: ``sleep``, and those of
            ``vllm.LLM``, such as ``gpu_memory_utilization``.
        prompts_per_iteration: prompts that one training iteration serves.
        num_generations: completions per prompt (a group).
        evaluation_generations: completions per problem in RLlib's evaluation while training: a
            pool for pass@k and maj@k.
        max_completion_tokens: length limit; part of the task, see `TokenEnv`.
        temperature: of the sampling distribution; the learner uses the same.
        top_p: nucleus mass kept, 1 keeps all.
        top_k: tokens kept, 0 keeps all.
        max_batch_size: rows that the engine decodes at once.
        dtype: type of the engine's weights and cache: ``"float32"`` or ``"bfloat16"``.
        max_staleness: updates by which the weights of an episode may lag behind the learner's:
            0 is strictly on-policy; with 1 the runners sample the next batch while the learner
            learns.
        torch_threads: torch threads of each process that samples or learns.
        max_env_runners: most env runners that scaling may ask Ray for; 0: as many as fit into the
            nodes that the cluster has at that time.
    """

    engine: str = "torch"
    engine_options: dict[str, Any] = field(default_factory=dict)
    prompts_per_iteration: int = 32
    num_generations: int = 8
    evaluation_generations: int = 1
    max_completion_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_batch_size: int = 256
    dtype: str = "float32"
    max_staleness: int = 0
    torch_threads: int = 1
    max_env_runners: int = 0

    @property
    def episodes_per_iteration(self) -> int:
        """Prompts times completions per prompt."""
        return self.prompts_per_iteration * self.num_generations

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they travel in a module's ``model_config``."""
        return asdict(self)

    def validate(self) -> None:
        """Checks every value.

        Raises:
            ValueError: with what was got, what is allowed and what to do.
        """
        for name, allowed in (("engine", ENGINES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"[rollout] {name} is {value!r}; it must be one of {', '.join(allowed)}."
                )
        if self.engine == "vllm" and find_spec("vllm") is None:
            raise ValueError(_NO_VLLM)
        if self.engine == "torch" and self.engine_options:
            raise ValueError(
                f"[rollout] engine_options has {', '.join(self.engine_options)}, but the torch "
                "engine takes none. Remove them, or set engine = 'vllm'."
            )
        if self.max_staleness not in (0, 1):
            raise ValueError(
                f"[rollout] max_staleness is {self.max_staleness}; it must be 0 (on-policy) or 1 "
                "(the next batch is sampled while the learner learns)."
            )
        counts = (
            "prompts_per_iteration",
            "num_generations",
            "evaluation_generations",
            "max_completion_tokens",
            "max_batch_size",
            "torch_threads",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"[rollout] {name} is {getattr(self, name)}; it must be >= 1.")
        if self.max_env_runners < 0:
            raise ValueError(
                f"[rollout] max_env_runners is {self.max_env_runners}; it must be >= 0 "
                "(0: what the cluster can hold)."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"[rollout] temperature is {self.temperature}; it must be above 0. "
                "Greedy sampling is chosen with `explore = false` in [env_runners]."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"[rollout] top_p is {self.top_p}; it must lie in (0, 1].")
        if self.top_k < 0:
            raise ValueError(f"[rollout] top_k is {self.top_k}; it must be >= 0 (0: off).")
