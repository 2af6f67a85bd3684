"""Any Hugging Face causal LM: by folder, by hub id, in a GGUF file, or built in."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distrl_envs import tokenizers
from rllib_distrl.model.builtin import PREFIX, builtin_folder, find_spec
from rllib_distrl.model.causal_lm import gist, no_progress_bars
from rllib_distrl.model.gguf import gguf_folder, names_gguf

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

GENERATION_CONFIG, _ADAPTER = "generation_config.json", "adapter_config.json"
# Runes, cuneiform, and a private character.
_STRANGE = "\u16a0\U00012000\ue000"
_LONGEST_REASON = 300
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CHOICES = (
    "Give a folder that a model was saved to, the id of a model on the Hugging Face hub, a GGUF "
    f"file, or {PREFIX}countdown."
)


def resolve(name: str) -> str:
    """What `from_pretrained` takes for a name.

    A built-in model is built on its first use (see `builtin.builtin_folder`), a GGUF file converted
    (see `gguf.gguf_folder`): call this before starting processes that load one, so that its
    progress is seen and nothing waits for it.

    Args:
        name: A folder, a hub id, a GGUF file, `package:...` or `builtin:...`.

    Returns:
        The path of a folder that holds a config.json, or the hub id as it is.

    Raises:
        ValueError: If the built-in model is unknown, a path does not exist, a folder holds no
            model, or an adapter for one, or a GGUF file cannot be read.
    """
    if name.startswith(PREFIX):
        return str(builtin_folder(find_spec(name)))
    if names_gguf(name):
        return str(gguf_folder(name))
    if not name:
        raise ValueError(f"Got the empty name {name!r} for a model. {CHOICES}")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / _ADAPTER).is_file():
            raise _adapter_only(path)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"The folder {name!r} holds no config.json, so no model was saved to it. {CHOICES}"
            )
        return str(path)
    if path.exists():
        raise ValueError(f"Got the file {name!r} where a model's folder is needed. {CHOICES}")
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"There is no folder {name!r}, and no model can have this id. {CHOICES}")
    return name


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model; of a built-in one without building it.

    Args:
        name: As `resolve` takes it.

    Raises:
        ValueError: As `resolve`; or if the configuration cannot be loaded, needs code of its own,
            or describes quantised weights.
    """
    if name.startswith(PREFIX):
        return find_spec(name).model_config()
    from transformers import AutoConfig

    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded("configuration", name, error) from None
    _check_quantisation(config, name)
    return config


def window_of(name: str) -> int | None:
    """Tokens of prompt and completion together that a model can read; None: it names no limit.

    Args:
        name: A folder, a hub id, or `builtin:...`, of which nothing is built or imported.

    Raises:
        ValueError: As `load_config`.
    """
    if name.startswith(PREFIX):
        return find_spec(name).window
    return getattr(load_config(name), "max_position_embeddings", None)


def _check_quantisation(config: PreTrainedConfig, name: str) -> None:
    """Refuses weights that gradients do not reach."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            settings = getattr(part, key, None)
            if settings:
                get = settings.get if isinstance(settings, dict) else vars(settings).get
                raise ValueError(
                    f"The weights of {name!r} are quantised ({get('quant_method') or key}), so "
                    "they cannot learn. Name the checkpoint that they were made from, or a copy "
                    "that was dequantised and saved."
                )


def load_model(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A causal LM in evaluation mode.

    Args:
        name: As `resolve` takes it.
        dtype: Of the weights.
        device: Where they go.

    Raises:
        ValueError: As `resolve`; if the model cannot be loaded, is no causal LM, or its weights
            are incomplete.
    """
    from transformers import AutoModelForCausalLM

    load_config(name)
    load_generation_config(name)  # Transformers would go on without one that cannot be read
    source = resolve(name)
    bars = no_progress_bars() if name.startswith(PREFIX) else nullcontext()
    try:
        with bars:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:
        raise _not_loaded("model", name, error) from None
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapter_only(Path(name))
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The weights of {name!r} lack {len(missing)} tensors of {type(model).__name__}, "
            f"{missing[0]} for instance: it was not saved as a causal LM, or not completely. "
            f"{CHOICES}"
        )
    return model.to(device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; of a built-in one without building it.

    Args:
        name: As `resolve` takes it.

    Raises:
        ValueError: As `resolve`; if there is no tokenizer, it has no EOS token, or it knows ids
            that the model has no embedding for.
    """
    if name.startswith(PREFIX):
        find_spec(name)
        return tokenizers.small_tokenizer()
    config = load_config(name)
    tokenizer = tokenizers.load_tokenizer(resolve(name))
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # What AutoTokenizer (Transformers 5.16) makes for known architectures without any files.
        raise ValueError(
            f"No tokenizer was saved with the model {name!r}. Save one into its folder with "
            "tokenizer.save_pretrained, or name another model."
        )
    check_vocabulary(config, tokenizer)
    return tokenizer


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a tokenizer has ids outside a model's vocabulary.

    The other way round is usual: models pad their vocabulary.
    """
    size = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has token ids up to {largest}, the model's "
            f"vocabulary ends at {size - 1}. Use the model's own tokenizer, or resize the model's "
            "embeddings to the tokenizer."
        )


def eos_token_ids(
    model: PreTrainedModel | GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every token that ends a completion, ascending.

    The tokenizer's EOS and those of the generation configuration: a chat model ends its turns with
    the one and its texts with the other. Left out of the latter are ids that the tokenizer does
    not know, and a single one that it makes of unknown words: defaults of an architecture, meant
    for another vocabulary. (Byte-level tokenizers name an unknown token, often the end of a text,
    but never make one.)

    Args:
        model: A model or its generation configuration.
        tokenizer: Encodes for that model.

    Raises:
        ValueError: If the tokenizer has no EOS token.
    """
    own = tokenizer.eos_token_id
    if not isinstance(own, int):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so completions could "
            "never end: set tokenizer.eos_token, or choose another tokenizer."
        )
    generation = getattr(model, "generation_config", model)
    named = getattr(generation, "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    known = set(tokenizer.get_vocab().values())
    meant = {token for token in named if token in known}
    if meant == {getattr(tokenizer, "unk_token_id", None)} and _makes_unknown(tokenizer):
        meant = set()
    return tuple(sorted(meant | {own}))


def _makes_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether characters that no vocabulary holds become the unknown token."""
    try:
        ids = tokenizer.encode(_STRANGE, add_special_tokens=False)
    except Exception:  # no unknown token to fall back to
        return True
    return tokenizer.unk_token_id in ids


def load_generation_config(name: str) -> GenerationConfig:
    """The generation configuration saved with a model; an empty one where there is none.

    That of a built-in model comes without building it.

    Args:
        name: As `resolve` takes it.

    Raises:
        ValueError: As `resolve`; or if there is one that cannot be read.
    """
    if name.startswith(PREFIX):
        return find_spec(name).generation_config()
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(
            resolve(name),
            GENERATION_CONFIG,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            return GenerationConfig()
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        config = GenerationConfig.from_dict(settings)
        ends = config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if not all(x is None or isinstance(x, int) for x in ends):
            raise ValueError(f"eos_token_id is {config.eos_token_id!r}")
    except Exception as error:
        raise ValueError(
            f"The {GENERATION_CONFIG} of {name!r} cannot be read ({gist(error)}), and it says "
            "which tokens end a text. Repair it, or delete it to go by the tokenizer alone."
        ) from None
    return config


def _adapter_only(path: Path) -> ValueError:
    try:
        base = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "another model"
    return ValueError(
        f"The folder {str(path)!r} holds an adapter for {base!r}, not a model. Merge it once and "
        "name the new folder: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
        ".merge_and_unload().save_pretrained(NEW), with the tokenizer saved beside it. Or name the "
        "base model and train an adapter with [rl_module] model_config.lora."
    )


def _not_loaded(part: str, name: str, error: Exception) -> ValueError:
    """The error for a model that Transformers refuses, with the gist of its reason."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "custom code" in reason:
        return ValueError(
            f"The {part} of {name!r} needs code that comes with it, which is never run here. "
            f"Choose a model of an architecture that Transformers knows. {CHOICES}"
        )
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]} ..."
    if Path(name).expanduser().is_dir():
        return ValueError(f"No {part} could be loaded from the folder {name!r}: {reason} {CHOICES}")
    return ValueError(
        f"The model {name!r} is neither a local folder nor could its {part} be loaded from the "
        f"Hugging Face hub: {reason} {CHOICES}"
    )
