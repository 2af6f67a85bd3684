import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from rllib_distrl.model.causal_lm import checkpoint_activations
from tests.learner.rig import gradients, hot_config, make_learner, sample

QWEN = Qwen2Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=112,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=112, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def episodes():
    return sample(hot_config())


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_gradients_with_checkpointing_are_the_same(episodes, critic):
    _, plain = gradients(make_learner(hot_config(critic=critic)), episodes)
    settings = {"critic": critic, "activation_checkpointing": True}
    _, again = gradients(make_learner(hot_config(**settings)), episodes)
    assert plain.keys() == again.keys()
    assert len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("config", [QWEN, GPT2], ids=["Qwen2", "GPT2"])
def test_only_the_inputs_of_blocks_are_kept_and_nothing_drops_out(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 112, (8, 40), generator=torch.Generator().manual_seed(0))
    names = list(model.state_dict())
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    plain = kept_elements(model, ids)
    checkpoint_activations(model)
    found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    assert list(model.state_dict()) == names
    blocks = config.num_hidden_layers * ids.numel() * config.hidden_size
    assert kept_elements(model, ids) < min(plain / 2, 4 * blocks)


def kept_elements(model, ids):
    """Elements of the tensors that autograd saves in a forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if (pointer := tensor.untyped_storage().data_ptr()) not in weights:
            kept[pointer] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum()
    return sum(kept.values())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Leave activation_checkpointing out"):
        checkpoint_activations(nn.Linear(2, 2))


def test_bf16_keeps_weights_gradients_and_logits_in_float32(episodes):
    learner = make_learner(hot_config(precision="bf16"))
    module = learner.policy_module
    products = set()
    for layer in (module.policy, module.critic):
        projection = dict(layer.named_modules())
        name = next(name for name in projection if name.endswith("q_proj"))
        projection[name].register_forward_hook(lambda *call: products.add(call[2].dtype))
    outputs = module.forward_train(learner.columns(episodes))
    assert products == {torch.bfloat16}
    assert outputs["action_dist_inputs"].dtype == torch.float32
    _, found = gradients(learner, episodes)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_bf16_agrees_with_fp32_to_its_own_precision(episodes):
    low, high = (make_learner(hot_config(precision=name)) for name in ("bf16", "fp32"))
    columns = high.columns(episodes)
    with torch.no_grad():
        logps = [x.policy_module.forward_train(columns)["action_dist_inputs"] for x in (low, high)]
    difference = (logps[0] - logps[1])[columns["loss_mask"]].abs()
    assert 0 < float(difference.max()) < 0.1
    assert float(difference.mean()) < 0.01
    one, other = (gradients(learner, episodes)[1] for learner in (low, high))
    flat = [torch.cat([g[name].flatten() for name in sorted(other)]) for g in (one, other)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.99
