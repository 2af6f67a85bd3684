"""The default rollout engine: plain PyTorch, in process, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from rllib_distrl.engine.conversation import Conversation
from rllib_distrl.engine.fast_weights import unsupported
from rllib_distrl.engine.protocol import (
    UNKNOWN_VERSION,
    Completion,
    Request,
    SamplingParams,
    check_requests,
)
from rllib_distrl.engine.scheduler import (
    Call,
    DrawingDecoder,
    ResumingDecoder,
    SteppingDecoder,
)
from rllib_distrl.engine.weights import check_names, content_hash, copy_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Imported when an engine is made: Numba, which compiles kernels, takes a third of a second.
_DECODERS = {
    "compiled": "compiled_decoder:CompiledDecoder",
    "fast": "fast_decoder:FastDecoder",
    "generic": "generic_decoder:GenericDecoder",
}
DecoderName = Literal["auto", "compiled", "fast", "generic"]


def choose_decoder(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> DecoderName:
    """What "auto" stands for: kernels on CPUs, CUDA graphs, or Transformers."""
    if device.type == "cpu":
        from rllib_distrl.engine.compiled_decoder import not_compiled

        return "generic" if not_compiled(config, device, dtype) else "compiled"
    return "generic" if unsupported(config) else "fast"


class TorchEngine:
    """Samples from a Hugging Face causal LM held in the engine's own tensors.

    The results depend on what else is in the batch only through floating-point ties.

    Args:
        model_config: The model's config; the weights come with `load_weights`.
        eos_token_ids: Tokens that end a completion (they are part of it); may be empty.
        max_batch_size: Most rows decoded at a time; further requests wait for a place.
        max_seq_len: Longest prompt and completion together, in tokens; None: the model's window.
        device: A torch device.
        dtype: Type of weights and cache, float32 or bfloat16.
        decoder: "compiled" (Qwen2, Qwen3, Llama on CPU), "fast" (the same models in PyTorch's
            operators, on any device, as CUDA graphs), "generic" (any causal LM), or "auto".

    Attributes:
        is_eos: (V,) bool, True at the tokens that end a completion.
        stops: `stream` ends completions where a conversation says so.

    Raises:
        ValueError: An argument outside its range, or a decoder that does not compute this model.
    """

    stops = True

    def __init__(
        self,
        model_config: PreTrainedConfig,
        eos_token_ids: Iterable[int],
        *,
        max_batch_size: int = 256,
        max_seq_len: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        decoder: DecoderName = "auto",
    ) -> None:
        self.version = UNKNOWN_VERSION
        self.config, self.device, self.dtype = model_config, torch.device(device), dtype
        self.max_batch_size = max_batch_size
        text_config = model_config.get_text_config()
        window = getattr(text_config, "max_position_embeddings", None)
        self.max_seq_len = min(n for n in (window, max_seq_len, 1 << 62) if n is not None)
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size}: must be at least 1.")
        if decoder not in ("auto", *_DECODERS):
            raise ValueError(
                f'decoder={decoder!r}: must be "auto", "compiled", "fast" or "generic".'
            )
        if decoder == "auto":
            decoder = choose_decoder(model_config, self.device, dtype)
        module, _, kind = _DECODERS[decoder].partition(":")
        make: Any = getattr(import_module(f"rllib_distrl.engine.{module}"), kind)
        self.decoder: SteppingDecoder | DrawingDecoder = make(model_config, self.device, dtype)
        self.is_eos = self._eos_table(eos_token_ids, text_config.vocab_size)

    @staticmethod
    def _eos_table(eos_token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
        """(V,) bool, True at end-of-sequence tokens."""
        is_eos = np.zeros(vocab_size, dtype=bool)
        for token in eos_token_ids:
            if not 0 <= token < len(is_eos):
                raise ValueError(f"eos token {token}: the vocabulary has {len(is_eos)} tokens.")
            is_eos[token] = True
        return is_eos

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Samples one completion per request; see `RolloutEngine.generate`.

        Args:
            requests: Any number of requests, in any order.
            params: How to sample.

        Returns:
            The completions, in the order of the requests.

        Raises:
            ValueError: A bad parameter, an empty prompt, a token outside the vocabulary, or a
                prompt and completion longer than the window.
            RuntimeError: No weights were loaded yet.
        """
        ended = dict(self.stream(requests, params))
        return [ended[index] for index in range(len(requests))]

    @torch.inference_mode()
    def stream(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        conversation: Conversation | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """The same, each completion as soon as it has ended; nothing else may be asked meanwhile.

        Rows are taken up in the order in which their prompts first occur in ``requests``.

        Args:
            requests: See `generate`.
            params: How to sample.
            conversation: Answers turns, where the engine `resumes`; see `conversation.converse`.
                Where it does not, its `stops` still end completions, and it must never answer.

        Yields:
            The place of a request among ``requests`` and its completion.

        Raises:
            ValueError: See `generate`; when the first completion is asked for.
            RuntimeError: See `generate`.
        """
        if self.version == UNKNOWN_VERSION:
            raise RuntimeError("The engine has no weights yet: call load_weights first.")
        params.validate()
        if not requests:
            return
        check_requests(requests, params.max_tokens, self.max_seq_len, len(self.is_eos))
        call = Call(self.decoder, requests, params, self.is_eos, self.device, conversation)
        yield from call.run(self.max_batch_size)

    @torch.inference_mode()
    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> str:
        """Copies a Hugging Face state dict into the engine's tensors, in place.

        Args:
            state: Tensors under their Hugging Face names, any type and device.
            version: Number of these weights, 0 or more.

        Returns:
            `weights_hash()` after loading:
            `content_hash(state, dtype=engine.dtype, sample=version)`.

        Raises:
            ValueError: A negative version, or missing, unexpected or mis-shaped tensors
                (nothing is loaded then).
        """
        if version < 0:
            raise ValueError(f"version={version}: must be 0 or more.")
        check_names(state, self.decoder.shapes())
        copy_weights(state, self.decoder.canonical())
        self.version = version
        return self.weights_hash()

    @property
    def resumes(self) -> bool:
        """Whether `stream` takes a conversation, and rows that wait keep what was computed."""
        return isinstance(self.decoder, ResumingDecoder)

    def forgo_cache(self) -> bool:
        """Runs the whole context at each step from now on; False where that is no choice."""
        if not getattr(self.decoder, "caches", False):
            return False
        self.decoder.caches = False  # pyright: ignore[reportAttributeAccessIssue]
        self.decoder.close()
        return True

    def weights_hash(self) -> str:
        """Content hash of the engine's own tensors now; of large ones the version's sample."""
        return content_hash(self.decoder.canonical(), sample=self.version)
