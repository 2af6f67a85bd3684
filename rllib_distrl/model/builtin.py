"""Models that need no download: small Qwen2s, warm-started once on generated solutions.

`builtin:countdown` knows how an answer looks and mostly how to calculate, and solves a good tenth
of the problems: something for reinforcement learning to start from.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from distrl_envs import task as task_module
from distrl_envs.task import GeneratedTask
from distrl_envs.tasks import make_task
from distrl_envs.tokenizers import EOS, PAD, VOCABULARY
from rllib_distrl.model import warm_start
from rllib_distrl.model.cached_folder import CachedFolder, content_key

if TYPE_CHECKING:
    from transformers import GenerationConfig, Qwen2Config

PREFIX = "builtin:"


@dataclass(frozen=True)
class BuiltinSpec:
    """Everything that determines a built-in model, apart from the code.

    Attributes:
        name: What follows "builtin:".
        task: Name of a generated task.
        task_config: Its arguments, apart from the split.
        hidden_size: Width; divided by `num_heads` it gives the head size, at least 32 for vLLM.
        num_layers: Transformer blocks.
        num_heads: Attention heads, as many for keys and values.
        intermediate_size: Width of the feed-forward part.
        window: Most tokens of prompt and completion together.
        initializer_range: Standard deviation of the initial weights.
        steps: Optimiser steps of the warm start.
        batch_size: Examples per step, each used once.
        lr: Peak learning rate of AdamW; linear warm-up, then a cosine.
        warmup_steps: Steps of the warm-up.
        seed: Of the initial weights and the examples.
    """

    name: str
    task: str = "countdown"
    task_config: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 2
    intermediate_size: int = 192
    window: int = 128
    initializer_range: float = 0.08
    steps: int = 2_200
    batch_size: int = 64
    lr: float = 1e-2
    warmup_steps: int = 50
    seed: int = 0

    def make_task(self, split: str = "train") -> GeneratedTask:
        """The task whose solutions the model is trained on."""
        made = make_task(self.task, split=split, **self.task_config)
        assert isinstance(made, GeneratedTask)
        return made

    def model_config(self) -> Qwen2Config:
        """The Hugging Face configuration, without building anything."""
        from transformers import Qwen2Config

        return Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.window,
            initializer_range=self.initializer_range,
            tie_word_embeddings=True,
            eos_token_id=VOCABULARY[EOS],
            pad_token_id=VOCABULARY[PAD],
            architectures=["Qwen2ForCausalLM"],
        )

    def generation_config(self) -> GenerationConfig:
        """What `warm_start.build` saves beside the model, without building anything."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True, eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD]
        )

    def key(self) -> dict[str, Any]:
        """What a cached build must agree with to be used."""
        task = self.make_task()
        return {
            "spec": asdict(self),
            "vocabulary": VOCABULARY,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sources": [
                inspect.getsource(inspect.getmodule(type(task)) or task_module),
                inspect.getsource(task_module),
                inspect.getsource(warm_start),
            ],
        }


SPECS = {
    spec.name: spec
    for spec in (
        BuiltinSpec("countdown"),
        BuiltinSpec("graph-path", task="graph_path"),
        # Six numbers instead of four: completions of 30 tokens instead of 18.
        BuiltinSpec("countdown-6", task_config={"numbers": 6}, steps=1_600),
        # For tests and quick looks: knows the form of an answer, seldom the answer.
        BuiltinSpec(
            "countdown-tiny",
            hidden_size=32,
            num_layers=2,
            num_heads=1,
            intermediate_size=96,
            steps=500,
            batch_size=32,
            lr=2e-2,
        ),
    )
}
"""The built-in models by name."""


def find_spec(name: str) -> BuiltinSpec:
    """The specification of `builtin:NAME`.

    Raises:
        ValueError: If there is no such model.
    """
    try:
        return SPECS[name.removeprefix(PREFIX)]
    except KeyError:
        allowed = ", ".join(PREFIX + known for known in SPECS)
        raise ValueError(
            f"Got model {name!r}; the built-in models are {allowed}. Choose one of them, a folder, "
            "or the id of a model on the Hugging Face hub."
        ) from None


def builtin_folder(spec: BuiltinSpec, root: Path | None = None) -> Path:
    """The Hugging Face folder of a built-in model, built on first use.

    The build is deterministic (up to the processor's arithmetic), uses one thread, and leaves the
    caller's random state and thread count as they were. The folder also holds `meta.json`: what
    determined it, its loss, and a checksum of each file. Of several processes one builds, the
    others wait.

    Args:
        spec: The model.
        root: Cache directory; by default `cached_folder.cache_root()`.

    Raises:
        ValueError: If the cache directory cannot be written to.
    """
    key = spec.key()
    folder = CachedFolder(f"{spec.name}-{content_key(key)}", f"{PREFIX}{spec.name}", root)
    del key["sources"]  # already in the hash; too long to record
    return folder.get(lambda target: {"key": key, **warm_start.build(spec, target)})
