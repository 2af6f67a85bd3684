import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distrl_envs.tokenizers import small_tokenizer
from rllib_distrl.algorithm.inspection import single_texts, token_texts


def byte_tokenizer():
    """One token per byte, as byte-level tokenizers fall back to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_split_characters_appear_with_their_last_token():
    tokenizer = byte_tokenizer()
    text = "a 三😀é"
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + 1 + 3 + 4 + 2
    texts = token_texts(tokenizer, tokenizer("x").input_ids, ids)
    assert texts == ["a", " ", "", "", "三", "", "", "", "😀", "", "é"]
    assert "".join(texts) == text


def test_a_character_that_never_ends_is_shown_as_such():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab三").input_ids[:-1]
    assert token_texts(tokenizer, [], ids) == ["a", "b", "", "\ufffd"]


def test_words_keep_the_space_before_them():
    tokenizer = small_tokenizer()
    prompt, ids = tokenizer("3 4 -> 7 :").input_ids, tokenizer("3 + 4 = 7").input_ids
    assert token_texts(tokenizer, prompt, ids) == [" 3", " +", " 4", " =", " 7"]
    assert single_texts(tokenizer, [np.array([[ids[0], ids[1]]])]) == {ids[0]: "3", ids[1]: "+"}
