"""Every causal architecture of Transformers, tiny and random: what learner and engine make of it.

    python -m benchmarks.models                # all of them, then docs/models.md
    python -m benchmarks.models qwen3 granite  # a few, printed

Weights are larger than at a usual start, so that a wrong path is seen in the logps, and settings
that change logits are not left at their neutral defaults. Each model is saved, loaded, checked as
at the start of a run, and then compared in gradients and in what the engine samples.
"""

import argparse
import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
import transformers
from ray.rllib.core.columns import Columns
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rllib_distrl.engine.protocol import SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.engine.weights import check_engine, content_hash
from rllib_distrl.model.causal_lm import ordinary_tokens
from rllib_distrl.model.causal_lm_module import CausalLMModule
from rllib_distrl.model.self_check import prepare_policy
from rllib_distrl.model.sequences import INPUT_IDS, PROMPT_LENS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
VOCABULARY = 128
SCALE = 3.0
"""By how much matrices are larger than at a usual start."""

# Sizes by the names that configurations use, each set where a configuration has it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["vocab_size", "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx",
         "context_length", "decoder_vocab_size", "vocab_size_per_layer_input"],
        VOCABULARY,
    ),
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "embedding_size", "embed_dim", "emb_dim", "dim",
         "lru_width", "word_embed_proj_dim", "attention_hidden_size", "backbone_hidden_size",
         "input_embedding_size", "output_embedding_size", "embedding_dim", "n_embed"],
        32,
    ),
    **dict.fromkeys(
        ["intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
         "ffn_hidden_size", "intermediate_size_mlp", "dim_ff", "dff", "feed_forward_size",
         "d_inner", "dense_intermediate_size"],
        48,
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers",
         "encoder_layers", "num_blocks", "num_decoder_layers", "num_encoder_layers",
         "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k",
         "swa_num_key_value_heads", "linear_num_key_heads", "n_mamba_heads", "mamba_expand",
         "index_n_heads", "o_groups", "encoder_attention_heads", "num_encoder_attention_heads"],
        2,
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "num_decoder_attention_heads", "attention_heads", "num_experts", "n_routed_experts",
         "num_local_experts", "moe_num_experts", "mamba_num_heads", "mamba_n_heads",
         "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads", "rotary_dim",
         "conv_kernel", "mamba_d_conv", "mamba_dt_rank", "time_step_rank"],
        4,
    ),
    **dict.fromkeys(
        ["head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state", "state_size",
         "ssm_state_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
         "patch_size", "chunk_size", "mamba_chunk_size", "block_size", "kv_channels", "dim_head",
         "swa_head_dim", "attention_head_size", "d_head", "attention_head_dim", "global_head_dim",
         "hidden_size_per_layer_input", "ple_embed_dim", "hc_lowrank", "o_lora_rank"],
        8,
    ),
    **dict.fromkeys(
        ["q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim",
         "mamba_headdim", "sliding_window", "index_head_dim", "router_hidden_size",
         "dim_model_base"],
        16,
    ),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"],
        24,
    ),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace",
                     "mamba_n_groups", "n_groups", "bos_token_id"], 1),
    **dict.fromkeys(
        ["attention_window_size", "attention_chunk_size", "index_topk", "mamba_d_ssm",
         "audio_vocab_size", "pronunciation_vocab_size", "shape_vocab_size",
         "ngram_vocab_size_base"],
        64,
    ),
    "v_head_dim": 12, "image_size": 32, "pad_token_id": 0, "eos_token_id": 2, "cls_token_id": 3,
    "sep_token_id": 4, "num_kv_shared_layers": 0, "use_mamba_kernels": False,
    # Never neutral where they follow the head.
    "logits_scaling": 8.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0, "logits_soft_cap": 5.0, "output_logit_soft_cap": 5.0,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4}
_MIXED = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
# What single architectures need besides.
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"],
        _MLA,
    ),
    **dict.fromkeys(
        ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "olmo_hybrid"],
        _MIXED,
    ),
    "qwen3_5": {"text_config": _MIXED}, "qwen3_5_moe": {"text_config": _MIXED},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {
        "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 16,
              "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
    "kimi_linear": {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_token": 2,
                    "num_expert_group": 1, "topk_group": 1, "moe_topk": 2, "v_head_dim": 8,
                    "layer_types": ["linear_attention", "full_attention"],
                    "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"num_key_value_heads": 4},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    # Encoders with the switch that makes them decoders; others stay as they come.
    **{
        kind: {"is_decoder": True}
        for kind in ("bert-generation", "rembert", "megatron-bert", "roberta", "electra")
    },
}  # fmt: skip


@dataclass
class Finding:
    """What was found for one architecture; texts as they stand in the table."""

    kind: str
    model: str = ""
    path: str = ""
    logits: str = ""
    logps: str = ""
    gradients: str = ""
    engine: str = ""
    verdict: str = ""

    def row(self) -> str:
        """A row of the table."""
        cells = (self.kind, self.path, self.logits, self.logps, self.gradients, self.engine)
        return f"| {' | '.join(cells)} | {self.verdict} |"


def tiny_config(kind: str) -> Any:
    """A configuration of an architecture with small sizes."""
    default = AutoConfig.for_model(kind)
    settings = _sizes_of(default)
    for name in default.sub_configs or {}:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            settings[name] = {**_sizes_of(part), "model_type": part.model_type}
    for name, value in EXTRA.get(kind, {}).items():
        inner = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **value} if inner else value
    return AutoConfig.for_model(kind, **settings)


def _sizes_of(config: Any) -> dict[str, Any]:
    mapped = config.attribute_map or {}
    return {
        name: value for name, value in SIZES.items() if name not in mapped and _has(config, name)
    }


def _has(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # a setting that differs between layers
        return False


def tiny_model(kind: str) -> Any:
    """A random model whose logits are not flat, and whose norms and biases are not neutral."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(SCALE)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def examine(kind: str) -> Finding:
    """Builds, saves, loads and tries one architecture."""
    found = Finding(kind)
    try:
        model = tiny_model(kind)
    except Exception as error:
        found.verdict = f"not tried: {_line(error)}"
        return found
    found.model = type(model).__name__
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            module = make_module(folder)
            path = prepare_policy(module)
        except ValueError as error:
            found.verdict = f"refused: {_line(error)}"
            return found
        except Exception as error:
            found.verdict = f"FAILS: {type(error).__name__}: {_line(error)}"
            return found
        found.path = "packed" if path.packs else "padded"
        found.logits = _map_text(module.logit_map)
        found.logps = f"{path.difference:.0e}"
        try:
            found.gradients = f"{gradient_error(module):.0e}"
            found.engine = engine_error(module.policy, folder)
            found.verdict = "yes" if float(found.gradients) < 1e-3 else "WRONG GRADIENTS"
        except Exception as error:
            found.verdict = f"FAILS after the start's check: {_line(error)}"
    return found


def make_module(folder: str) -> CausalLMModule:
    """The module as a learner has it."""
    space = gymnasium.spaces.Discrete(VOCABULARY)
    settings = {"model": folder, "critic": "separate"}
    return CausalLMModule(
        observation_space=space, action_space=space, model_config=settings, inference_only=False
    )


def gradient_error(module: Any) -> float:
    """Largest difference of the policy's gradients from those of its own forward pass.

    Relative to the largest gradient; of the mean of some logps and of their entropies.
    """
    columns, rows = example_batch(module.policy)
    module.policy.requires_grad_(True)
    parameters = [p for p in module.policy.parameters() if p.is_floating_point()]
    outputs = module.sampled_tokens(
        module.policy,
        module.states(module.policy, module.sequences(columns)),
        module.sequences(columns),
    )
    # Entropies get another weight than logps, so that neither hides in the other.
    weights = torch.tensor([1.0, 0.5])
    found = torch.autograd.grad((outputs * weights).sum(), parameters, allow_unused=True)
    total = torch.zeros(())
    for ids, n in rows:
        logits = module.policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, n - 1 : -1]
        logps = logits.float().log_softmax(-1)
        picked = logps.gather(-1, torch.tensor(ids[n:])[:, None]).sum()
        total = total + picked - 0.5 * (logps.exp() * logps).sum()
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one is not None or other is not None:
            one = torch.zeros_like(other) if one is None else one
            other = torch.zeros_like(one) if other is None else other
            worst = max(worst, float((one - other).abs().max()))
    return worst / scale


def example_batch(model: Any) -> tuple[dict[str, torch.Tensor], list[tuple[list[int], int]]]:
    """Three rows of other tokens than those of the check at the start, two with one prompt."""
    drawn = iter(ordinary_tokens(model.config, 64, seed=7))
    prompt = [next(drawn) for _ in range(3)]
    rows = [
        ([*prompt, *(next(drawn) for _ in range(4))], 3),
        ([*prompt, *(next(drawn) for _ in range(2))], 3),
        ([next(drawn) for _ in range(6)], 2),
    ]
    width, steps = max(len(ids) for ids, _ in rows), max(len(ids) - n for ids, n in rows)
    ids, actions = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, steps, dtype=torch.long)
    mask = torch.zeros(3, steps, dtype=torch.bool)
    for row, (tokens, n) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        actions[row, : len(tokens) - n] = torch.tensor(tokens[n:])
        mask[row, : len(tokens) - n] = True
    columns = {
        INPUT_IDS: ids,
        PROMPT_LENS: torch.tensor([n for _, n in rows]),
        Columns.ACTIONS: actions,
        Columns.LOSS_MASK: mask,
    }
    return columns, rows


def engine_error(model: Any, folder: str) -> str:
    """Mean difference of what the engine samples; its weights must have the learner's hash."""
    engine = TorchEngine(AutoConfig.from_pretrained(folder), [])
    held = engine.load_weights(model.state_dict(), 0)
    if held != content_hash(model.state_dict()):
        raise ValueError("The engine reports another hash of the weights than the learner.")
    error = check_engine(engine, model, SamplingParams(max_tokens=8), "float32")
    return f"{error:.0e}" + ("" if getattr(engine.decoder, "caches", True) else ", no cache")


def _map_text(logit_map: Any) -> str:
    factor = "" if logit_map.scale == 1.0 else f"x {logit_map.scale:g}"
    cap = "" if logit_map.cap is None else f"cap {logit_map.cap:g}"
    return ", ".join(filter(None, (factor, cap)))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"/tmp/\w+", "FOLDER", text)[:220].replace("|", "/")


def page(findings: Sequence[Finding]) -> str:
    """docs/models.md."""
    right = sum(found.verdict == "yes" for found in findings)
    refused = sum(found.verdict.startswith("refused") for found in findings)
    return _PAGE.format(
        right=right,
        refused=refused,
        untried=len(findings) - right - refused,
        total=len(findings),
        transformers=transformers.__version__,
        torch=torch.__version__,
        rows="\n".join(found.row() for found in findings),
    )


_PAGE = """# Models

Any causal language model that Transformers loads: by folder, by hub id, or built in. None is taken
on trust. When a learner loads a model, logps of random tokens on its own path (packed rows, prompts
that rows share, logits in chunks) are compared with the model's own forward pass, in float32; a
runner compares what its engine samples. What does not agree is refused by name before anything is
sampled, with any algorithm.

* **rows**: packed ones compute a prompt that they share once. Models with sliding windows or
  recurrences, and those that turn out to mix packed rows, compute padded ones.
* **head**: what the model does to its LM head's output; measured, and part of the learner's pass.
* **logps**, **engine**: largest difference of the learner's logps, mean difference of the engine's,
  from the model's own; **gradients**: largest difference, relative to the largest gradient.
  OPT's were compared weight by weight too, in rows that share prompts and rows that do not: all
  within 3e-6 of its own forward pass but for the biases of keys, whose gradient is rounding alone
  (`tests/model/test_packing.py`).
* **no cache**: the model's key-value cache cannot be shared between rows, so that every token runs
  its whole row: right, and slow. A warning says so.

Refused as well, from their files alone: quantised checkpoints, models that need code of their own,
and folders that hold an adapter only; each message says what to do instead.

`python -m benchmarks.models` made this table: tiny random models of all {total} causal
architectures of Transformers {transformers} (torch {torch}), in float32 on a CPU. {right} train as
they compute, {refused} are refused, {untried} could not be built that small. Rows are shorter than
any window and than the choice of a sparse attention (DeepSeek V3.2), which is not tried here.

| architecture | rows | head | logps | gradients | engine | works |
|---|---|---|---|---|---|---|
{rows}
"""


def main(kinds: Sequence[str]) -> None:
    """Examines architectures and prints a row for each; all of them: writes the page."""
    findings = []
    for kind in kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            findings.append(examine(kind))
        print(findings[-1].row(), flush=True)
    if not kinds:
        PAGE.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    main(parser.parse_args().kinds)
