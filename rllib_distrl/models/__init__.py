"""Loading of language models: by path, by hub id, or built in."""

from rllib_distrl.models.loading import (
    check_vocabulary,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve,
)

__all__ = [
    "check_vocabulary",
    "eos_token_ids",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "resolve",
]
