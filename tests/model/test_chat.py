"""The chat format matches the released strings byte for byte."""

from __future__ import annotations

import subprocess
import sys

import pytest

from model import chat

SYSTEM = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"


def test_single_turn_is_the_released_string():
    rendered = chat.render(
        [{"role": "user", "content": "<image>\nWhat is this?"}], add_generation_prompt=True
    )
    assert rendered == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|><|im_start|>assistant\n"
    )


def test_second_turn_follows_the_answer_without_a_newline():
    first = [{"role": "user", "content": "<image>\nWhat is this?"}]
    both = [
        *first,
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    appended = "A cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n"
    rendered = chat.render(first, add_generation_prompt=True) + appended
    assert chat.render(both, add_generation_prompt=True) == rendered


def test_suffixes_are_the_released_strings():
    thinking = (
        "You FIRST think about the reasoning process as an internal monologue and then provide "
        "the final answer. The reasoning process MUST BE enclosed within <think> </think> tags. "
        "The final answer MUST BE put in \\boxed{}."
    )
    assert thinking == chat.THINKING_SUFFIX
    assert chat.with_thinking("Why?") == "Why?\n" + thinking
    assert chat.SHORT_ANSWER_SUFFIX == "\nAnswer the question using a single word or phrase."
    assert chat.LONG_ANSWER_SUFFIX == "\nAnswer this question in detail."


def test_own_system_turn_replaces_the_default_and_empty_means_none():
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert chat.render(own).startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n")
    assert chat.render(own[1:], system_message="") == "<|im_start|>user\nHi<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "front"),
        ([{"role": "user", "content": ["x"]}], "text content"),
    ],
)
def test_bad_conversations_are_named(messages, reason):
    with pytest.raises(chat.ChatError, match=reason):
        chat.render(messages)


def test_imports_without_torch():
    code = "import sys, model.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
