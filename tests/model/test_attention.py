"""Packed rows give the states and the gradients of padded ones, or are not used."""

import pytest
import torch
import transformers

from rllib_distrl.maths.packing import pack
from rllib_distrl.model import causal_lm
from rllib_distrl.model.causal_lm import let_pack_rows, packs_rows
from tests.learner.rig import hot_config, make_learner, sample

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": 50,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "initializer_range": 0.3}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}


def make_model(family, **settings):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows():
    ids = torch.randint(2, 50, (6, 20), generator=torch.Generator().manual_seed(0))
    ids[1:3, :5], ids[4, :9] = ids[0, :5], ids[3, :9]
    return ids, torch.tensor([5, 5, 5, 9, 9, 2]), torch.tensor([9, 5, 14, 20, 15, 12])


def packed_states(trunk, packing):
    outputs = trunk(
        input_ids=packing.input_ids.unsqueeze(0),
        position_ids=packing.positions.unsqueeze(0),
        use_cache=False,
        packing=packing,
    )
    return outputs.last_hidden_state.squeeze(0)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Gemma", "GPT2"])
@pytest.mark.parametrize("device_kind", ["cpu", "other"])
def test_states_and_gradients_are_those_of_padded_rows(family, device_kind, monkeypatch):
    model = make_model(family, **(GPT2 if family == "GPT2" else {})).double()
    ids, prompt_lens, lengths = rows()
    packing = pack(ids, prompt_lens, lengths)
    weights = torch.randn(len(packing.input_ids), 32, dtype=torch.float64)

    def gradients(states):
        loss = (states * weights).sum()
        found = torch.autograd.grad(loss, list(model.base_model.parameters()))
        return states.detach(), found

    def padded():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states[packing.owners, packing.positions]

    expected = gradients(padded())
    let_pack_rows(model)
    assert packs_rows(model.base_model)
    torch.testing.assert_close(padded(), expected[0], rtol=0, atol=0)
    if device_kind == "other":
        plain = causal_lm.attention_of_rows

        def on_any_device(query, key, value, packing, scale):
            return plain(torch.nn.Module(), query, *repeated(query, key, value), packing)

        monkeypatch.setattr(causal_lm, "packed_attention", on_any_device)
    found = gradients(packed_states(model.base_model, packing))
    # Norms are in float32 in these models, whatever the weights are.
    tolerance = 1e-9 if family == "GPT2" else 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    scale = max(float(gradient.abs().max()) for gradient in expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


def repeated(query, *tensors):
    return (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in tensors)


OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
# The 350M model's: norms after the blocks, and embeddings of another width.
OPT_350M = {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [OPT, OPT_350M], ids=["125m", "350m"])
@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "prompts apart"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_of_opt_are_those_of_its_own_forward_pass(settings, share, seed):
    """Of every weight by itself, to the rounding of float32; docs/models.md has the numbers.

    A bias of keys moves all scores of a query alike and has no gradient but rounding: measured
    against itself, that alone is an error of 100 %.
    """
    model = make_model("OPT", **settings)
    ids, prompt_lens, lengths = rows()
    if not share:
        apart = torch.Generator().manual_seed(seed + 1)
        ids = torch.randint(2, 50, ids.shape, generator=apart)
    packing = pack(ids, prompt_lens, lengths)
    assert (len(packing.input_ids) < int(lengths.sum())) == share
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms are not neutral
    expected = opt_gradients(model, ids, prompt_lens, lengths, None)
    let_pack_rows(model)
    assert packs_rows(model.base_model)
    found = opt_gradients(model, ids, prompt_lens, lengths, packing)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        if name.endswith("k_proj.bias"):
            assert gradient.norm() < 1e-6 * whole and found[name].norm() < 1e-6 * whole
        else:
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, (name, float(error))


def opt_gradients(model, ids, prompt_lens, lengths, packing):
    """Gradients, by name, of the sum of weighted logps of all completion tokens."""
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(9))
    total = torch.zeros(())
    if packing is not None:
        states = packed_states(model.model, packing)
    for row, (start, end) in enumerate(zip(prompt_lens, lengths, strict=True)):
        if packing is None:
            logits = model(input_ids=ids[row : row + 1, :end], use_cache=False).logits[0]
        else:
            logits = model.lm_head(states[packing.rows[row, :end]])
        logps = logits[start - 1 : end - 1].log_softmax(-1)
        picked = logps.gather(-1, ids[row, start:end, None])[:, 0]
        total = total + (weights[row, start:end] * picked).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("Gemma2", {}),
        ("Mamba", {"num_attention_heads": 1}),
    ],
)
def test_windows_and_recurrences_keep_padded_rows(family, settings):
    model = make_model(family, **settings)
    let_pack_rows(model)
    assert not packs_rows(model.base_model)


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config(), prompts=3, generations=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"critic": "separate", "regularisers": [{"name": "kl", "coeff": 0.1}]},
        {"critic": "shared", "entropy_coeff": 0.01, "activation_checkpointing": True},
        {"critic": "shared", "micro_batch_tokens": 120},
    ],
    ids=["separate", "shared, checkpointing", "micro-batches"],
)
def test_an_updates_gradients_are_those_of_padded_rows(episodes, settings, monkeypatch):
    packed, tokens = gradients_of_update(episodes, settings)
    monkeypatch.setattr("rllib_distrl.model.causal_lm_module.packs_rows", lambda trunk: False)
    padded, more_tokens = gradients_of_update(episodes, settings)
    assert tokens < 0.95 * more_tokens
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def gradients_of_update(episodes, settings):
    learner = make_learner(hot_config(grad_clip=None, **settings))
    module, tokens = learner.policy_module, []

    def count(trunk, arguments, keywords):
        tokens.append(keywords["input_ids"].numel())

    module.policy.base_model.register_forward_pre_hook(count, with_kwargs=True)
    assert packs_rows(module.policy)
    learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return gradients, sum(tokens)
