"""Tiny models of every family with weights far from their initial values."""

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rllib_distrl.engine import Request, TorchEngine

VOCAB, WINDOW, EOS = 61, 96, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.18,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "qwen2-tied": lambda: Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2-gqa": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3-gqa": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "llama-mha": lambda: LlamaConfig(**SIZES, num_key_value_heads=4),
    "llama-biases-llama3": lambda: LlamaConfig(
        **SIZES,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=WINDOW,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.25,
    ),
    "gemma": lambda: GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8),
}
FAST = ["qwen2-tied", "qwen2-gqa", "qwen3-gqa", "llama-mha", "llama-biases-llama3"]


def make_model(name, seed=0):
    """A model whose norms and biases are not the ones and zeros they start as."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_engine(model, **options):
    """An engine that holds the model's weights."""
    engine = TorchEngine(model.config, [EOS], **options)
    engine.load_weights(model.state_dict(), 0)
    return engine


def make_requests(prompts=7, samples=4, longest=13, seed=5):
    """Ragged prompts, each sampled several times."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, VOCAB, size=1 + i * longest // prompts).tolist() for i in range(prompts)]
    return [
        Request(ids[row], (seed, row, sample, 0))
        for row in range(prompts)
        for sample in range(samples)
    ]


@torch.no_grad()
def reference_logps(model, request, completion, temperature=1.0):
    """Logps of a completion by one full forward of the Hugging Face model, unpadded."""
    ids = torch.tensor([[*request.prompt_ids, *completion.tokens.tolist()]])
    logits = model(input_ids=ids).logits[0].float() / temperature
    logps = torch.log_softmax(logits, -1)[len(request.prompt_ids) - 1 : -1]
    return logps.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0].numpy()
