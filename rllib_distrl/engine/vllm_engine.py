"""The rollout engine on vLLM, in process, with weights updated in place.

vLLM 0.32, one device. It is imported only when an engine is made, so that everything else works
without it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rllib_distrl.engine.protocol import (
    UNKNOWN_VERSION,
    Completion,
    Request,
    SamplingParams,
    check_requests,
)
from rllib_distrl.engine.sampling import uniform_words
from rllib_distrl.engine.vllm_weights import hugging_face_shapes, hugging_face_views
from rllib_distrl.engine.weights import check_names, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The engine must live in this process, and answer to nobody outside of it.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
# What a user may set otherwise: threads are pinned by the runner, not by vLLM.
_ENVIRONMENT_DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_CACHE_BYTES = 1 << 30
_SEED_BITS = np.uint64((1 << 63) - 1)


class VllmEngine:
    """Samples from a Hugging Face causal LM held by vLLM.

    Requests with equal prompts share their cached prefix, in whole blocks. Each request has a
    random generator of its own, seeded by its key, so that neither its company nor its order
    changes what is sampled, up to floating-point ties: vLLM's kernels add in an order that depends
    on the batch. The tokens differ from `TorchEngine`'s, which draws by other means.

    Attributes:
        model: vLLM's own module.
        shapes: The shape of each weight, by Hugging Face's names.
        views: The weights by these names: parts of the module's own tensors.

    Args:
        model_config: The model's config; the weights come with `load_weights`.
        eos_token_ids: Tokens that end a completion (they are part of it); may be empty.
        max_batch_size: Most rows decoded at a time; further requests wait for a place.
        max_seq_len: Longest prompt and completion together, in tokens; None: the model's window.
        dtype: Type of weights and cache, float32 or bfloat16.
        sleep: Gives the GPU's memory back between calls, for a learner on the same device.
        options: Further arguments of `vllm.LLM`, such as `gpu_memory_utilization`.

    Raises:
        ValueError: `sleep` without a GPU, or a model whose weights vLLM does not keep under names
            that can be followed.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        eos_token_ids: Iterable[int],
        *,
        max_batch_size: int = 256,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        sleep: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.version = UNKNOWN_VERSION
        self.config, self.dtype = model_config, dtype
        text_config = model_config.get_text_config()
        window = getattr(text_config, "max_position_embeddings", None)
        lengths = [n for n in (window, max_seq_len) if n is not None]
        self.max_seq_len = min(lengths) if lengths else 1 << 62
        self._vocab_size = text_config.vocab_size
        self._eos = sorted(eos_token_ids)
        arguments = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_num_seqs": max_batch_size,
            "max_model_len": min(lengths) if lengths else None,
            "enable_sleep_mode": sleep,
            **(options or {}),
        }
        self._llm = _start(model_config, arguments)
        self._sleep = sleep
        # In process, the "remote" call hands out the module itself.
        self.model: Any = self._llm.apply_model(lambda model: model)[0]
        self.shapes = hugging_face_shapes(model_config)
        self.views = hugging_face_views(self.model, self.shapes)
        if sleep:
            self._llm.sleep(level=1)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Samples one completion per request; see `RolloutEngine.generate`.

        Raises:
            ValueError: A bad parameter (entropies are not to be had), an empty prompt, a token
                outside the vocabulary, or a prompt and completion longer than the window.
            RuntimeError: No weights were loaded yet.
        """
        if self.version == UNKNOWN_VERSION:
            raise RuntimeError("The engine has no weights yet: call load_weights first.")
        params.validate()
        if params.entropy:
            raise ValueError("vLLM does not report entropies: use engine = 'torch' for them.")
        if not requests:
            return []
        prompts = [tuple(map(int, request.prompt_ids)) for request in requests]
        check_requests(requests, params.max_tokens, self.max_seq_len, self._vocab_size)
        # Equal prompts go in one after the other, while their blocks are in the cache.
        order = sorted(range(len(prompts)), key=prompts.__getitem__)
        with self._awake():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompts[i])} for i in order],
                [self._sampling(requests[i], params) for i in order],
                use_tqdm=False,
            )
        completions = [self._completion(output.outputs[0]) for output in outputs]
        found = dict(zip(order, completions, strict=True))
        return [found[i] for i in range(len(requests))]

    def _sampling(self, request: Request, params: SamplingParams) -> Any:
        from vllm import SamplingParams as VllmSamplingParams

        word = uniform_words([request.key], request.start + 1)[0, -1]
        return VllmSamplingParams(
            max_tokens=request.last(params.max_tokens) - request.start,
            temperature=0.0 if params.greedy else params.temperature,
            top_p=1.0 if params.greedy else params.top_p,
            top_k=0 if params.greedy else params.top_k,
            seed=int(word & _SEED_BITS),
            stop_token_ids=self._eos,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def _completion(self, output: Any) -> Completion:
        tokens = np.asarray(output.token_ids, dtype=np.int64)
        flat = output.logprobs
        logps = np.asarray(flat.logprobs, dtype=np.float32)[np.asarray(flat.start_indices)]
        first = np.asarray(flat.token_ids)[np.asarray(flat.start_indices)]
        if not np.array_equal(first, tokens):
            raise RuntimeError("vLLM has reported logps of other tokens than it sampled.")
        return Completion(tokens, logps, "stop" if int(tokens[-1]) in self._eos else "length")

    @torch.inference_mode()
    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> str:
        """Copies a Hugging Face state dict into vLLM's tensors, in place.

        Cached prefixes of the weights before are forgotten.

        Args:
            state: Tensors under their Hugging Face names, any type and device.
            version: Number of these weights, 0 or more.

        Returns:
            `weights_hash()` after loading.

        Raises:
            ValueError: A negative version, or missing, unexpected or mis-shaped tensors
                (nothing is loaded then).
            RuntimeError: vLLM would not forget its cache.
        """
        if version < 0:
            raise ValueError(f"version={version}: must be 0 or more.")
        check_names(state, self.shapes)
        with self._awake():
            self.model.load_weights([(name, state[name]) for name in self.shapes])
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache after new weights.")
            self.version = version
            return content_hash(self.views, sample=self.version)

    def weights_hash(self) -> str:
        """Content hash of vLLM's own tensors under Hugging Face's names, sampled if large."""
        with self._awake():
            return content_hash(self.views, sample=self.version)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Weights and cache on the device inside; with `sleep` off it again, also after errors."""
        if self._sleep:
            self._llm.wake_up()
        try:
            yield
        finally:
            if self._sleep:
                self._llm.sleep(level=1)


def _start(model_config: PreTrainedConfig, arguments: Mapping[str, Any]) -> Any:
    """A `vllm.LLM` with weights that mean nothing yet."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if arguments["enable_sleep_mode"]:
            raise ValueError("sleep gives a GPU's memory back, and there is none: remove it.")
        # Compiling takes minutes, and only pays off on large models.
        arguments = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": _CPU_CACHE_BYTES,
            **arguments,
        }
    with (
        tempfile.TemporaryDirectory() as folder,
        _plain_linear_layers(),
        _own_threads_and_seed(),
        _odd_attributes_passed_over(),
    ):
        model_config.save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="uni",
            disable_log_stats=True,
            **arguments,
        )


@contextlib.contextmanager
def _plain_linear_layers() -> Iterator[None]:
    """On CPU, linear layers read their weights instead of a packed copy of them.

    vLLM 0.32 packs weights once, after loading, and throws the originals away: later updates
    would never reach the copies (vllm/model_executor/layers/utils.py).
    """
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm

    def plain(layer: Any, remove_weight: bool) -> None:
        del remove_weight
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


@contextlib.contextmanager
def _odd_attributes_passed_over() -> Iterator[None]:
    """Lets vLLM's look through all loaded modules survive those of Numba.

    vLLM 0.32 asks every object of every module for `vars(object).get("kernel")`; the handle of
    LLVM's library answers any attribute, `__dict__` too, with a function
    (vllm/triton_utils/dispatcher.py, llvmlite/binding/ffi.py).
    """
    from vllm.triton_utils import dispatcher

    def attributes(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes  # hides the builtin of that name
    try:
        yield
    finally:
        del dispatcher.vars


@contextlib.contextmanager
def _own_threads_and_seed() -> Iterator[None]:
    """Undoes what vLLM's CPU worker does to the process: it seeds PyTorch and takes its threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)
