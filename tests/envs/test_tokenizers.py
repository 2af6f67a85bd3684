import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from distrl_envs import make_task
from distrl_envs.tokenizers import (
    EOS,
    PAD,
    UNK,
    VOCABULARY,
    decode_completion,
    is_small,
    load_tokenizer,
    mark_special,
    render_prompt,
    small_tokenizer,
)
from tests.envs.byte_tokenizer import CHAT, byte_tokenizer

TEXT = "3 4 7 9 -> 24 : 3 * 4 = 12 , 99 - 0 + 10 ;"
SMALL = small_tokenizer()


def test_the_vocabulary_by_hand():
    assert SMALL.encode("0 99 + -> :") == [3, 102, 103, 108, 109]
    assert (SMALL.pad_token_id, SMALL.eos_token_id, SMALL.unk_token_id) == (0, 1, 2)
    assert len(SMALL) == len(VOCABULARY) == 111
    assert SMALL.decode([6, 7, 108, 27]) == "3 4 -> 24"
    assert SMALL.encode("100 foo 3") == [2, 2, 6]


@pytest.mark.parametrize("config", [None, Qwen2Config, Qwen3Config, LlamaConfig, GPT2Config])
def test_round_trip_through_the_folder_of_a_model(config, tmp_path):
    if config is not None:
        config(vocab_size=111, bos_token_id=None, eos_token_id=1).save_pretrained(tmp_path)
    SMALL.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXT) == SMALL.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert (loaded.pad_token, loaded.eos_token, loaded.unk_token) == (PAD, EOS, UNK)
    assert is_small(loaded)
    # What is loaded by us can be saved and loaded again.
    load_tokenizer(str(tmp_path)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again.encode(TEXT)) == TEXT


def test_pickled_and_foreign_tokenizers_are_told_apart():
    assert is_small(pickle.loads(pickle.dumps(SMALL)))
    assert load_tokenizer(pickle.loads(pickle.dumps(SMALL))) is SMALL
    assert not is_small(byte_tokenizer())


@pytest.mark.parametrize("name", ["countdown", "arithmetic", "graph_path", "sums"])
def test_every_token_of_the_tasks_is_known(name):
    task = make_task(name)
    for row in range(50):
        problem = task.problem(row)
        assert VOCABULARY[UNK] not in render_prompt(SMALL, problem.prompt)


@given(st.lists(st.sampled_from([w for w in VOCABULARY if w[0] != "<"] + ["foo", "100", "->:"])))
def test_the_fast_path_encodes_as_the_tokenizer_does(words):
    text = " ".join(["3", *words])
    assert render_prompt(SMALL, text) == SMALL.encode(text)


@given(st.lists(st.integers(0, 110)))
def test_the_fast_path_decodes_as_the_tokenizer_does(ids):
    assert decode_completion(SMALL, [*ids, 1], {1}) == SMALL.decode(ids)


def test_decoding_drops_the_last_eos_only_and_shows_everything_else():
    assert decode_completion(SMALL, [6, 1, 0, 2, 1], {1}) == f"3 {EOS} {PAD} {UNK}"
    assert decode_completion(SMALL, [6, 7], {1}) == "3 4"
    assert decode_completion(SMALL, [6, 7], {7}) == "3"
    assert decode_completion(SMALL, [], {1}) == ""


def test_ids_beyond_the_tokenizer_stay_visible():
    assert decode_completion(SMALL, [6, 111, 7], {1}) == "3 \N{REPLACEMENT CHARACTER} 4"
    foreign = byte_tokenizer()
    ids = [*foreign.encode("ab"), 300, *foreign.encode("c"), 999]
    expected = "ab\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"
    assert decode_completion(foreign, ids, {256}) == expected


def test_prompts_without_a_chat_template():
    foreign = byte_tokenizer()
    assert foreign.decode(render_prompt(foreign, "2 + 2?")) == "2 + 2?"
    assert foreign.decode(render_prompt(foreign, "2 + 2?", "Be brief.")) == "Be brief.\n\n2 + 2?"
    boxed = render_prompt(foreign, "2 + 2?", template=r"Q: {prompt} Answer in \boxed{}.")
    assert foreign.decode(boxed) == r"Q: 2 + 2? Answer in \boxed{}."


def test_prompts_with_a_chat_template():
    chat = byte_tokenizer(chat_template=CHAT)
    assert chat.decode(render_prompt(chat, "2 + 2?")) == "[user]2 + 2?[assistant]"
    whole = render_prompt(chat, "2 + 2?", "Be brief.", "{prompt} Now.")
    assert chat.decode(whole) == "[system]Be brief.[user]2 + 2? Now.[assistant]"
    by_transformers = chat.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, return_dict=False
    )
    assert render_prompt(chat, "2 + 2?") == by_transformers


def test_what_a_tokenizer_puts_behind_a_text_is_left_out():
    tokenizer = byte_tokenizer(bos="<|begin|>")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", begin), ("<|end|>", end)]
    )
    assert tokenizer.encode("ab")[-1] == end
    assert render_prompt(tokenizer, "ab") == [begin, *byte_tokenizer().encode("ab")]


THINKING = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"


def test_variables_of_a_chat_template():
    chat = byte_tokenizer(chat_template=THINKING)
    quiet = render_prompt(chat, "2?", chat_template_kwargs={"enable_thinking": False})
    assert chat.decode(quiet) == "[user]2?[assistant]<none>"
    assert chat.decode(render_prompt(chat, "2?")) == "[user]2?[assistant]"
    with pytest.raises(ValueError, match="'thinking', which the chat template"):
        render_prompt(chat, "2?", chat_template_kwargs={"thinking": False})
    with pytest.raises(ValueError, match="has no chat template"):
        render_prompt(byte_tokenizer(), "2?", chat_template_kwargs={"thinking": False})


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "[{{ date_string }}]{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_a_template_that_asks_for_the_date_gets_the_same_every_day():
    chat = byte_tokenizer(chat_template=DATED)
    assert chat.decode(render_prompt(chat, "2?")) == "[26 Jul 2024]2?"
    chosen = render_prompt(chat, "2?", chat_template_kwargs={"date_string": "1 May 2025"})
    assert chat.decode(chosen) == "[1 May 2025]2?"


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match=r"'Question'.*\{prompt\}"):
        render_prompt(SMALL, "3", template="Question")
    with pytest.raises(ValueError, match="no tokens"):
        render_prompt(SMALL, " ")


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no EOS"):
        load_tokenizer(byte_tokenizer(eos=None))
    with pytest.raises(ValueError, match="No tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="neither a tokenizer nor a task"):
        load_tokenizer(None)


REFUSES = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
REFUSES += "[{{ m.role }}]{{ m.content | trim }}{% endfor %}[assistant]"
DROPS = "{% for m in messages if m.role == 'user' %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_a_template_that_refuses_a_system_message_gets_it_in_the_users_turn():
    tokenizer = byte_tokenizer(chat_template=REFUSES)
    prompt = tokenizer.decode(render_prompt(tokenizer, "1+1?", "Box it."))
    assert prompt == "[user]Box it.\n\n1+1?[assistant]"
    with pytest.raises(ValueError, match="refuses the prompt"):
        render_prompt(byte_tokenizer(chat_template="{{ raise_exception('no') }}"), "1+1?")


def test_a_template_that_drops_a_message_is_an_error():
    tokenizer = byte_tokenizer(chat_template=DROPS)
    assert tokenizer.decode(render_prompt(tokenizer, "1+1?")) == "[user]1+1?"
    with pytest.raises(ValueError, match=r"drops the system's message 'Box it\.'"):
        render_prompt(tokenizer, "1+1?", "Box it.")


@pytest.mark.parametrize("template", [None, CHAT])
def test_the_text_of_a_special_token_in_a_problem_stays_text(template):
    tokenizer = byte_tokenizer(chat_template=template)
    text = "what is <|end|> here?"
    ids = render_prompt(tokenizer, mark_special(tokenizer, text))
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == tokenizer.decode(render_prompt(tokenizer, text))
    # Elsewhere a special token is one: a template may be written with them.
    whole = render_prompt(tokenizer, mark_special(tokenizer, text), template="{prompt}<|end|>")
    assert whole.count(tokenizer.eos_token_id) == 1


def test_earlier_messages_keep_their_roles():
    context = [{"role": "system", "content": "Box it."}, {"role": "assistant", "content": "Hi."}]
    tokenizer = byte_tokenizer(chat_template=CHAT)
    ids = render_prompt(tokenizer, "1+1?", context=context)
    assert tokenizer.decode(ids) == "[system]Box it.[assistant]Hi.[user]1+1?[assistant]"
    plain = byte_tokenizer()
    assert plain.decode(render_prompt(plain, "1+1?", context=context)) == "Box it.\n\nHi.\n\n1+1?"
