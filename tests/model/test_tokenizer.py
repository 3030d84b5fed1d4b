"""The tokenizer: Qwen's make, the released tokens, the same every time."""

from __future__ import annotations

import pytest

from model.tokenizer import (
    SAIL_TOKENS,
    TokenizerError,
    add_sail_tokens,
    load_tokenizer,
    train_tokenizer,
)
from tests.model.tiny import TEXTS, tokenizer


def test_any_text_survives():
    text = "Ünïcode 漢字 \t\n\n  two  spaces 12.5 <box>(1,2),(3,4)</box> 🙂"
    ids = tokenizer()(text)["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone():
    bigger = train_tokenizer(["2024 2024 2024 77 77"] * 50, 320)
    assert bigger.convert_ids_to_tokens(bigger("2024")["input_ids"]) == ["2", "0", "2", "4"]


def test_special_tokens_are_single_ids_after_the_merges():
    vocabulary = tokenizer().get_vocab()
    order = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", *SAIL_TOKENS]
    ids = [vocabulary[token] for token in order]
    assert ids == list(range(len(tokenizer()) - len(order), len(tokenizer())))
    assert tokenizer().eos_token == "<|im_end|>"
    assert tokenizer().pad_token == "<|endoftext|>"


def test_think_survives_skipping_special_tokens_and_boxes_do_not():
    ids = tokenizer()("<think>a</think><box>b</box><|im_end|>")["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=True) == "<think>a</think>b"


def test_training_is_deterministic():
    first, second = (train_tokenizer(TEXTS * 4, 320).backend_tokenizer for _ in range(2))
    assert first.to_str() == second.to_str()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="at least 270"):
        train_tokenizer(TEXTS, 260)


def test_whole_words_are_one_token_and_only_as_whole_words(tmp_path):
    words = ["topleftredcircle", "left7"]
    train_tokenizer(TEXTS * 4, 320, words).save_pretrained(tmp_path)
    trained = load_tokenizer(tmp_path)
    assert len(trained) <= 320
    ids = [trained.convert_tokens_to_ids(word) for word in words]
    inside = trained("[ topleftredcircle left7 ]\nred", add_special_tokens=False)["input_ids"]
    assert [i for i in inside if i in ids] == ids
    assert len(trained(" left7")["input_ids"]) == 1
    assert ids[1] not in trained("left77 cleft7")["input_ids"]
    with pytest.raises(TokenizerError, match="2 whole words need at least 272"):
        train_tokenizer(TEXTS, 271, words)


def test_special_tokens_in_the_corpus_are_not_learned():
    trained = train_tokenizer(["<IMG_CONTEXT>" * 50, "<|im_end|>" * 50], 300)
    assert not [token for token in trained.get_vocab() if "IMG_CON" in token and token[0] != "<"]


def test_save_and_load(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer().get_vocab()
    assert loaded("red <think> 12")["input_ids"] == tokenizer()("red <think> 12")["input_ids"]
    assert add_sail_tokens(loaded) == 0
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "missing")
