"""Byte-level BPE tokenizers: Qwen's, and small ones of the same make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.chat import (
    BOX_END,
    BOX_START,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    THINK_END,
    THINK_START,
)

MODEL_MAX_LENGTH = 131072  # tokens, as released

QWEN_TOKENS = (END_OF_TEXT, IM_START, IM_END)
# Not special, so that they survive skip_special_tokens (as in Qwen3).
THINK_TOKENS = (THINK_START, THINK_END)
# In the order of the released ids 151669-151677: added to Qwen3's tokenizer they land there.
SAIL_TOKENS = (
    IMG_START,
    IMG_END,
    IMG_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    BOX_START,
    BOX_END,
)
# What only the template may write; in a user's text these are spelled out, never obeyed.
CONTROL_TOKENS = (*QWEN_TOKENS, IMG_START, IMG_END, IMG_CONTEXT)

# Qwen's pre-tokeniser: contractions, words, *single* digits, punctuation, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = 256


class TokenizerError(ValueError):
    """A tokenizer that cannot be made or used as asked."""


def _added_tokens() -> list[AddedToken]:
    plain = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    tokens = [AddedToken(token, special=True, **plain) for token in QWEN_TOKENS]
    tokens += [AddedToken(token, special=False, **plain) for token in THINK_TOKENS]
    return tokens + [AddedToken(token, special=True, **plain) for token in SAIL_TOKENS]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, whole_words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's pre-tokeniser and the released special tokens.

    The same texts in the same order give the same tokenizer. Ids: bytes and merges first, then
    the special tokens, as in Qwen.

    Args:
        texts: training text; occurrences of special tokens in it are not learned from.
        vocab_size: all ids together; a small corpus may run out of merges and give fewer.
        whole_words: words that are one token each, with the space before them; their ids come
            last.

    Returns:
        pad `<|endoftext|>`, eos `<|im_end|>`, no BOS.

    Raises:
        TokenizerError: vocab_size leaves no room for bytes and special tokens.
    """
    added = _added_tokens()
    whole = [AddedToken(word, single_word=True, lstrip=True) for word in whole_words]
    fixed = _BYTES + len(added) + len(whole)
    if vocab_size < fixed:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: {_BYTES} bytes, {len(added)} special tokens "
            f"and {len(whole)} whole words need at least {fixed}"
        )
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added) - len(whole),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = [*(token.content for token in added), *whole_words]
    tokenizer.train_from_iterator(_without(texts, names), trainer)
    tokenizer.add_tokens([*added, *whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _without(texts: Iterable[str], names: list[str]) -> Iterator[str]:
    for text in texts:
        for name in names:
            text = text.replace(name, "\n")
        yield text


def add_sail_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a Qwen3 tokenizer the released visual tokens; returns how many were new."""
    known = tokenizer.get_vocab()
    missing = [token for token in _added_tokens() if token.content not in known]
    return int(tokenizer.add_tokens(missing)) if missing else 0


def is_hub_id(name_or_path: str | Path) -> bool:
    """Whether this reads `owner/name` rather than a path on disk."""
    name = str(name_or_path)
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or a Hugging Face id, with the released visual tokens.

    Raises:
        TokenizerError: there is none, or it does not know the chat format's turns.
    """
    if not is_hub_id(name_or_path) and not (Path(name_or_path) / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{name_or_path} holds no tokenizer.json; is it a checkpoint directory?"
        )
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (IM_START, IM_END) if token not in vocabulary]
    if missing:
        raise TokenizerError(f"the tokenizer of {name_or_path} lacks {missing[0]}; use Qwen3's")
    add_sail_tokens(tokenizer)
    return tokenizer
