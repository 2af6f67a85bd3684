"""`forward_inference` and `forward_exploration` of prompts alone, as RLlib's users call them."""

import gymnasium
import numpy as np
import pytest
import torch

from rllib_distrl.model.causal_lm import packs_rows
from rllib_distrl.model.causal_lm_module import CausalLMModule, DistRLModule
from tests.model.test_self_check import KINDS, save_model

# Of several lengths; two are equal, and one begins with another.
PROMPTS = [[7, 30, 11, 52, 9], [41], [7, 30, 11], [23, 8, 8, 59], [41]]


def make(folder, cls=CausalLMModule, inference_only=False, **settings):
    space = gymnasium.spaces.Discrete(60)
    quantiles = {"n_quantiles": 3, "head_center": "mean", "init_spread": 0.1}
    return cls(
        observation_space=space,
        action_space=space,
        inference_only=inference_only,
        model_config={"model": str(folder), "temperature": 0.5, **quantiles, **settings},
    )


def own_logits(model, prompt):
    """Of the model itself, alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1]


@pytest.mark.parametrize("cls", [CausalLMModule, DistRLModule])
@pytest.mark.parametrize("inference_only", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_the_next_token_is_the_models_own_most_probable_one(kind, inference_only, cls, tmp_path):
    """Packed and padded, also behind a soft cap, on learner and runner."""
    model = save_model(tmp_path, kind, **KINDS[kind][0])
    module = make(tmp_path, cls, inference_only, micro_batch_tokens=9)  # several micro-batches
    assert packs_rows(module.policy) == (KINDS[kind][1] and not inference_only)
    logps = torch.stack([own_logits(model, prompt).log_softmax(-1) for prompt in PROMPTS])
    assert len(set(logps.argmax(-1).tolist())) > 2
    padded = torch.full((len(PROMPTS), 8), 59)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    lens = torch.tensor([len(prompt) for prompt in PROMPTS])
    for batch in ({"obs": PROMPTS}, {"obs": padded, "seq_lens": lens}):
        answer = module.forward_inference(batch)
        assert answer["actions"].tolist() == logps.argmax(-1).tolist()
        torch.testing.assert_close(answer["action_logp"], logps.amax(-1), rtol=0, atol=1e-5)


def test_exploration_draws_as_the_rollout_does(tmp_path):
    model = save_model(tmp_path, "qwen2")
    module = make(tmp_path, inference_only=True, rollout={"top_k": 3, "top_p": 1.0})
    best = own_logits(model, PROMPTS[0]).topk(3)
    p = (best.values / 0.5).softmax(-1)
    torch.manual_seed(3)
    drawn = module.forward_exploration({"obs": [PROMPTS[0]] * 2_000})
    counts = np.array([(drawn["actions"] == token).sum() for token in best.indices])
    assert counts.sum() == 2_000
    spread = 4 * (2_000 * p * (1 - p)).sqrt()
    assert (np.abs(counts - 2_000 * p.numpy()) < spread.numpy()).all()
    given = {int(token): float(x.log()) for token, x in zip(best.indices, p, strict=True)}
    expected = [given[token] for token in drawn["actions"].tolist()]
    torch.testing.assert_close(drawn["action_logp"], torch.tensor(expected), rtol=0, atol=1e-5)
    again = module.forward_exploration({"obs": [PROMPTS[0]] * 2_000})
    assert not torch.equal(drawn["actions"], again["actions"])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "take the token ids of prompts"),
        ({"obs": []}, "take the token ids of prompts"),
        ({"obs": [4, 8]}, "take the token ids of prompts"),
        ({"obs": ["4 8"]}, "take the token ids of prompts"),
        ({"obs": [[4.0]]}, "take the token ids of prompts"),
        # An observation: a count, tokens, zeros.
        ({"obs": torch.tensor([[2, 4, 8, 0]])}, "prompt_ids in the info of reset"),
        ({"obs": torch.tensor([[4, 8]]), "seq_lens": [3]}, "take the token ids of prompts"),
        ({"obs": torch.tensor([[4, 8]]), "seq_lens": [-1]}, "take the token ids of prompts"),
        ({"obs": torch.tensor([[4, 8]]), "seq_lens": [1, 1]}, "take the token ids of prompts"),
        ({"obs": [[4], []]}, r"Prompt 1 is empty, or holds tokens outside of .* 0\.\.59: \[\]"),
        ({"obs": [[4, 60]]}, r"Prompt 0 is empty, .*\[4, 60\]"),
        ({"obs": [[4, -1]]}, r"Prompt 0 is empty"),
        ({"obs": [[4], [4] * 65]}, "Prompt 1 has 65 tokens, and the model's window is 64"),
    ],
)
def test_what_is_no_prompt_is_refused(batch, words, tmp_path):
    save_model(tmp_path, "qwen2")
    module = make(tmp_path, inference_only=True)
    for forward in (module.forward_inference, module.forward_exploration):
        with pytest.raises(ValueError, match=words):
            forward(batch)
