import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen2Config

from rllib_distrl.learner.batch_pass import model_columns
from rllib_distrl.model import lora
from tests.helpers import with_model_config
from tests.learner.rig import hot_config, make_learner, pass_apart, sample

pytest.importorskip("peft")
SETTINGS = {"r": 3, "alpha": 6, "targets": ["q_proj", "down_proj"]}
QWEN = Qwen2Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=50,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))


def adapted(config, targets):
    model = AutoModelForCausalLM.from_config(config).eval()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.add_adapters(model, {**SETTINGS, "targets": targets}, seed=5)
    return model, plain


def learn(model):
    """Random adapters, as after some steps."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.mark.parametrize(
    ("config", "targets"), [(QWEN, ["q_proj", "down_proj"]), (GPT2, "all-linear")]
)
def test_merged_weights_compute_what_the_adapters_do(config, targets):
    model, plain = adapted(config, targets)
    with torch.no_grad():
        start = model(input_ids=IDS).logits
        learn(model)
        expected = model(input_ids=IDS).logits
        merged = lora.merged_state(model)
        assert merged.keys() == plain.keys()
        again = lora.merged_state(model)
        assert all(torch.equal(merged[name], again[name]) for name in merged)
        other = AutoModelForCausalLM.from_config(config).eval()
        other.load_state_dict(merged)
        torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        with lora.adapters_off(model):
            assert torch.equal(model(input_ids=IDS).logits, start)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert float((expected - start).abs().max()) > 0.01
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed
    assert all(weight.dim() == 2 for weight in (merged[name] for name in changed))


def test_delta_by_hand():
    model, plain = adapted(QWEN, ["q_proj"])
    learn(model)
    layer = model.model.layers[1].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(lora.merged_state(model)[name], plain[name] + 6 / 3 * product)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_parameters_are_counted_without_the_model(targets):
    model, _ = adapted(QWEN, targets)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora.count_adapter_parameters({**SETTINGS, "targets": targets}, QWEN) == count


def test_adapters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first, _ = adapted(QWEN, ["q_proj"])
    torch.manual_seed(2)
    second, _ = adapted(QWEN, ["q_proj"])
    third = AutoModelForCausalLM.from_config(QWEN)
    lora.add_adapters(third, {**SETTINGS, "targets": ["q_proj"]}, seed=6)
    weights = [
        m.model.layers[0].self_attn.q_proj.lora_A["default"].weight for m in (first, second, third)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 4}, "The nearest one is 'r'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": "16"}, "alpha is '16'"),
        (3, "lora is 3; it must be a table"),
        ({"targets": 3}, "targets is 3"),
        ({"targets": ["query"]}, "q_proj"),
        ({"targets": ["lm_head"]}, "linear layers"),
        ({"targets": []}, "linear layers"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError, match=words):
        lora.check_lora(settings, QWEN)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rllib-distrl\[peft\]'"):
        lora.check_lora({}, QWEN)


def lora_config(**training):
    config = hot_config(**training)
    with_model_config(config, lora=SETTINGS)
    config.validate()
    return config


@pytest.fixture(scope="module")
def episodes():
    return sample(lora_config())


@pytest.mark.parametrize("critic", ["separate", "twin", "shared"])
def test_only_adapters_and_value_head_learn(episodes, critic):
    settings = {"critic": critic, "regularisers": [{"name": "kl"}], "lr": 1e-2}
    learner = make_learner(lora_config(**settings, activation_checkpointing=critic == "shared"))
    module = learner.policy_module
    assert learner.reference.policy is module.policy
    before = {name: x.clone() for name, x in module.state_dict().items()}
    for k in (1, 2):
        result = learner.update(episodes=episodes, timesteps={"training_iteration": k})
    moved = {n for n, x in module.state_dict().items() if not torch.equal(x, before[n])}
    moved -= {"value_initialised"}
    assert all(".lora_" in name or name.startswith("value_head") for name in moved)
    owners = {name.split(".")[0] for name in moved}
    assert owners == ({"policy", "value_head"} | ({"critic"} if critic != "shared" else set()))
    assert result["default_policy"]["regularisation"].peek() > 0


KL_AND_ENTROPY = {
    "regularisers": [{"name": "kl", "coeff": 0.5}],
    "shapers": [{"name": "entropy_shaped"}],
    "entropy_coeff": 0.01,
    "activation_checkpointing": True,
    "lr": 1e-2,
}


def test_before_the_update_the_reference_is_the_base_and_the_policy_is_the_adapted_one(episodes):
    learner = make_learner(lora_config(**KL_AND_ENTROPY))
    learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    module, columns = learner.policy_module, learner.columns(episodes)
    found = model_columns(module, learner.reference, columns, {"ref_logp", "entropy"})
    own = module.compute_logps(columns)

    plain = make_learner(hot_config()).policy_module  # has never had adapters
    torch.testing.assert_close(found["ref_logp"], plain.compute_logps(columns))
    assert float((found["ref_logp"] - own).abs().max()) > 0.01
    plain.policy.load_state_dict(lora.merged_state(module.policy))
    merged = model_columns(plain, None, columns, {"entropy"})
    torch.testing.assert_close(found["entropy"], merged["entropy"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, plain.compute_logps(columns), rtol=1e-4, atol=1e-5)


def test_the_references_pass_between_forward_and_backward_changes_nothing(episodes):
    def gradients(learner):
        for k in (1, 2):
            learner.update(episodes=episodes, timesteps={"training_iteration": k})
        return {name: p.grad for name, p in learner.policy_module.named_parameters()}

    once = gradients(make_learner(lora_config(**KL_AND_ENTROPY)))
    apart = pass_apart(make_learner(lora_config(**KL_AND_ENTROPY)))
    for name, gradient in gradients(apart).items():
        if gradient is not None:
            torch.testing.assert_close(once[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_separate_critic_shares_the_frozen_weights():
    module = make_learner(lora_config()).policy_module
    frozen = {id(p) for p in module.policy.parameters() if not p.requires_grad}
    own = [p for p in module.critic.parameters() if id(p) not in frozen]
    assert all(p.requires_grad for p in own)
    assert own


def test_env_runners_get_merged_weights(episodes):
    learner = make_learner(lora_config(lr=1e-2))
    learner.update(episodes=episodes, timesteps={"training_iteration": 1})
    module = learner.policy_module
    state = module.get_state(inference_only=True)
    assert not any("lora" in name or "critic" in name for name in state)
    merged = lora.merged_state(module.policy)
    for name, tensor in merged.items():
        assert torch.equal(torch.as_tensor(state[f"policy.{name}"]), tensor)
    full = module.get_state()
    other = make_learner(lora_config()).policy_module
    other.set_state(full)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_experts_that_get_no_adapter_are_named():
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4}
    config = AutoConfig.for_model("qwen3_moe", moe_intermediate_size=32, **sizes)
    # Of the trunk's 2 layers: experts 4 x 3 x 32 x 32, attention 4 x 32 x 32 and 2 norms of 8,
    # router 4 x 32, 2 norms of 32; beside them 100 x 32 embeddings and a norm.
    experts, rest = 2 * 12288, 2 * (4096 + 16 + 128 + 64) + 3200 + 32
    assert f"{experts / (experts + rest):.0%} of the trunk" in lora.without_adapter({}, config)
    assert lora.without_adapter({"targets": ["q_proj"]}, config) == ""
    dense = AutoConfig.for_model("qwen2", num_hidden_layers=1)
    assert lora.without_adapter({"r": 4}, dense) == ""
