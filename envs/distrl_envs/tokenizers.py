"""Tokenizers: the small one of the generated tasks, loading any other, and prompts as tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
LARGEST_NUMBER = 99
PUNCTUATION = ("+", "-", "*", "=", ",", "->", ":", ";")
VOCABULARY = {
    token: index
    for index, token in enumerate(
        (PAD, EOS, UNK, *map(str, range(LARGEST_NUMBER + 1)), *PUNCTUATION)
    )
}
"""Tokens of the small tokenizer to their ids; a number of 0..99 is one token."""
WORDS = tuple(VOCABULARY)

MARK_START, MARK_END = "\ue000", "\ue001"
MARK = re.compile(f"{MARK_START}(\\d+){MARK_END}")
"""Stands for the text of a special token within a prompt; characters of private use."""

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"

TODAY = date(2024, 7, 26)
"""What chat templates that name a date take for today: the day that Llama 3.1's own falls back to.

A prompt that changes overnight would make another task of it."""


@lru_cache(maxsize=1)
def small_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the generated tasks: tokens are separated by white space.

    `save_pretrained` and `AutoTokenizer.from_pretrained` round-trip, also in the folder of a model.
    One object per process.
    """
    from tokenizers import Tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(VOCABULARY, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        # Beside a Qwen2 configuration AutoTokenizer (Transformers 5.16) ignores tokenizer_class and
        # makes a Qwen2Tokenizer, which drops the words of tokenizer.json unless this key is in
        # tokenizer_config.json. It runs no code from anywhere: there is none to run.
        trust_remote_code=True,
    )


def is_small(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is the small one, also after a round trip through a folder."""
    if tokenizer is small_tokenizer():
        return True
    alike = len(tokenizer) == len(VOCABULARY) and tokenizer.get_vocab() == VOCABULARY
    return alike and not getattr(tokenizer, "chat_template", None)


class OwnsTokenizer(Protocol):
    """A task."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that its problems are written for."""
        ...


def load_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase | None, task: OwnsTokenizer | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS token, from whatever names one.

    Args:
        tokenizer: A tokenizer, the path or hub id of one, or None for the task's own.
        task: Gives its own tokenizer where none is named.

    Raises:
        ValueError: If nothing is named or can be loaded from the name, or there is no EOS token.
    """
    if tokenizer is None:
        loaded = _own_tokenizer(task)
    elif isinstance(tokenizer, str):
        loaded = _from_pretrained(tokenizer)
    else:
        loaded = tokenizer
    if loaded.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {loaded.name_or_path or type(loaded).__name__!r} has no EOS token, so "
            "completions could never end: set tokenizer.eos_token, or choose another tokenizer."
        )
    # A reloaded copy would lose what makes its folders loadable, and the fast paths below.
    return small_tokenizer() if is_small(loaded) else loaded


def _own_tokenizer(task: OwnsTokenizer | None) -> PreTrainedTokenizerBase:
    if task is None:
        raise ValueError(
            "Got neither a tokenizer nor a task: give the path or id of a tokenizer, or the task "
            "whose own tokenizer is meant."
        )
    return task.tokenizer()


@lru_cache(maxsize=8)
def _from_pretrained(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}: {error} Give a folder that holds "
            "tokenizer files, or the id of a model on the Hugging Face hub."
        ) from error


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    system_prompt: str | None = None,
    template: str | None = None,
    context: Sequence[Mapping[str, str]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    r"""The prompt as token ids.

    Uses the tokenizer's chat template where it has one. A template that refuses a system message
    gets it at the head of the first turn of the user; one that drops it is an error. To one that
    asks for the date it is `TODAY`, unless a variable of its own says otherwise. Without a
    template earlier messages stand before the text, and special tokens are those that the
    tokenizer puts before it by itself (a BOS, say); what it would put behind (an EOS, a separator)
    would end the text that is to be continued. What `mark_special` has marked is encoded as text.

    Args:
        tokenizer: What encodes.
        text: The problem's prompt.
        system_prompt: Goes into the chat template's system message.
        context: Messages before the text, `{"role": ..., "content": ...}` each.
        template: Text in which each `{prompt}` stands for the problem's prompt; other braces are
            left alone, so that `\boxed{}` may stand in it.
        chat_template_kwargs: Further variables of the chat template, such as Qwen3's
            `enable_thinking`.

    Raises:
        ValueError: If the template has no `{prompt}`, the chat template refuses the messages, drops
            one or does not read one of the variables, or the prompt has no tokens.
    """
    check_chat_template_kwargs(tokenizer, chat_template_kwargs)
    if template is not None:
        if "{prompt}" not in template:
            raise ValueError(
                f"Got the prompt template {template!r}; it must contain {{prompt}} where the "
                "problem's text goes."
            )
        text = template.replace("{prompt}", text)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, *map(dict, context), {"role": "user", "content": text}]
    if getattr(tokenizer, "chat_template", None):
        chat = _chat(tokenizer, messages, chat_template_kwargs or {})
        ids = encode_marked(tokenizer, chat, special=False)
    else:
        whole = "\n\n".join(message["content"] for message in messages)
        ids = (
            _encode_small(whole)
            if is_small(tokenizer)
            else encode_marked(tokenizer, whole, special=True)
        )
    if not ids:
        raise ValueError("The prompt has no tokens: the model needs at least one to start from.")
    return list(ids)


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The messages in the tokenizer's chat template, up to where the model's turn begins.

    Raises:
        jinja2.exceptions.TemplateError: Whatever the template refuses.
    """
    # Found before Transformers' own function of this name, which asks the clock.
    settings = {"strftime_now": TODAY.strftime, **(variables or {})}
    chat = [dict(message) for message in messages]
    return str(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **settings)
    )


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    variables: Mapping[str, Any],
) -> str:
    """The messages in the tokenizer's chat template, none of them refused or dropped."""
    from jinja2.exceptions import TemplateError

    try:
        chat = rendered_chat(tokenizer, messages, variables)
    except TemplateError as error:
        if messages[0]["role"] != "system":
            raise ValueError(
                f"The tokenizer's chat template refuses the prompt: {error}"
            ) from error
        first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{**messages[1], "content": first}, *messages[2:]]
        try:
            chat = rendered_chat(tokenizer, messages, variables)
        except TemplateError:
            raise ValueError(
                f"The tokenizer's chat template refuses the prompt, its system message also in the "
                f"user's turn: {error}"
            ) from error
    for message in (messages[0], messages[-1]):
        if message["content"].strip() not in chat:
            raise ValueError(
                f"The tokenizer's chat template drops the {message['role']}'s message "
                f"{message['content']!r:.60}, so the model would not see it. Put its text into the "
                "instruction, or choose a tokenizer with another template."
            )
    return chat


def mark_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with each text of a special token marked, for `render_prompt` to encode as text."""
    specials = _special_texts(tokenizer)
    for index, special in enumerate(specials):
        if special in text:
            text = text.replace(special, f"{MARK_START}{index}{MARK_END}")
    return text


@lru_cache(maxsize=8)
def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What the tokenizer takes for control, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Encodes a text; halves of what `mark_special` has marked are encoded apart, and stay text.

    With `special` the tokenizer puts before it what it does by itself.
    """
    if MARK_START not in text:
        return _encode_open(tokenizer, text, special)
    specials, ids = _special_texts(tokenizer), []
    for number, piece in enumerate(MARK.split(text)):
        if number % 2:
            token = specials[int(piece)]
            half = (len(token) + 1) // 2
            for part in filter(None, (token[:half], token[half:])):
                ids += tokenizer.encode(part, add_special_tokens=False)
        elif piece or not number:
            ids += _encode_open(tokenizer, piece, special and not number)
    return ids


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_token_ids: Collection[int]
) -> str:
    """The text of a completion without its final EOS.

    Other special tokens stay visible: what was sampled is what is graded. Ids that the tokenizer
    does not know (models pad their vocabulary) become the replacement character.
    """
    ended = bool(ids) and ids[-1] in eos_token_ids
    kept = list(ids[:-1] if ended else ids)
    if tokenizer is small_tokenizer():
        return _decode_small(kept)
    known = _known_tokens(tokenizer)
    if kept and max(kept) >= known:
        return _decode_around_unknown(tokenizer, kept, known)
    return str(tokenizer.decode(kept, skip_special_tokens=False))


@lru_cache(maxsize=8)
def _known_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """`len` of a tokenizer, which takes milliseconds where it has many added tokens."""
    return len(tokenizer)


def _encode_open(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """A text as tokens, with what the tokenizer puts before it and without what it puts behind."""
    bare = tokenizer.encode(text, add_special_tokens=False)
    if not special:
        return bare
    whole = tokenizer.encode(text)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    return whole


def check_chat_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None
) -> None:
    """Raises ValueError for variables that the tokenizer's chat template does not read."""
    if not settings:
        return
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"Got chat_template_kwargs {sorted(settings)}, but the tokenizer "
            f"{tokenizer.name_or_path!r} has no chat template. Leave them out."
        )
    if isinstance(template, Mapping):
        template = tokenizer.get_chat_template()
    for name in settings:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"Got chat_template_kwargs with {name!r}, which the chat template of "
                f"{tokenizer.name_or_path!r} does not read. Leave it out, or choose a model whose "
                "template does."
            )


def ends_with_stop(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str], start: int = 0
) -> bool:
    """Whether the last token of a completion completes one of the stop strings.

    Args:
        tokenizer: What decodes.
        ids: The completion so far; no stop string stands in it before its last token.
        stop: The strings.
        start: Where the turn begins whose end is looked for.
    """
    if not stop or not ids:
        return False
    # A token has at least a byte, so that a stop string lies in as many tokens as it has bytes.
    longest = max(len(string.encode()) for string in stop) + 1
    text = decode_completion(tokenizer, ids[max(start, len(ids) - longest) :], ())
    return any(string in text for string in stop)


def check_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
    """Raises ValueError for stop strings that no tokens of the tokenizer spell."""
    for string in stop:
        if not (_spells_small if is_small(tokenizer) else _spells)(tokenizer, string):
            raise ValueError(
                f"Got the stop string {string!r}, which the tokenizer "
                f"{tokenizer.name_or_path or type(tokenizer).__name__!r} cannot produce, so it "
                "would never end anything. Leave it out, or choose one of its tokens' texts."
            )


def _spells(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text comes back from its tokens, at the start or behind a word."""
    return any(
        text in decode_completion(tokenizer, tokenizer.encode(some, add_special_tokens=False), ())
        for some in (text, f"a{text}", f"a {text}")
    )


def _spells_small(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text stands somewhere in words with a space between each two."""
    first, *rest = text.split(" ")
    if not rest:
        return any(first in word for word in WORDS)
    *inner, last = rest
    return (
        any(word.endswith(first) for word in WORDS)
        and all(word in VOCABULARY for word in inner)
        and any(word.startswith(last) for word in WORDS)
    )


def _encode_small(text: str) -> list[int]:
    """What the small tokenizer makes of a text, some hundred times faster."""
    unknown = VOCABULARY[UNK]
    return [VOCABULARY.get(word, unknown) for word in text.split()]


def _decode_small(ids: list[int]) -> str:
    return " ".join([WORDS[token] if token < len(WORDS) else UNDECODABLE for token in ids])


def _decode_around_unknown(tokenizer: PreTrainedTokenizerBase, ids: list[int], known: int) -> str:
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token < known:
            pieces[-1].append(token)
        else:
            pieces.append([])
    texts = (str(tokenizer.decode(piece, skip_special_tokens=False)) for piece in pieces)
    return UNDECODABLE.join(texts)
