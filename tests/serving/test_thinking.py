"""The stream's split of reasoning and answer does not depend on where the pieces are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.thinking import ThinkSplitter, split

CASES = [
    ("12", "", "12"),
    ("<think>5 and 7</think>\n\\boxed{12}", "5 and 7", "\\boxed{12}"),
    ("\n<think>\n5 and 7\n</think>\n\n12\n", "5 and 7", "12\n"),
    ("<think>never ends", "never ends", ""),
    ("<think>ends in a half tag</thi", "ends in a half tag</thi", ""),
    ("a < b and <b>", "", "a < b and <b>"),
    ("stray </think> tag", "", "stray </think> tag"),
    ("<think>a</think>b<think>c</think>d", "a\nc", "bd"),
    ("<think>\n\n</think>3", "", "3"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), CASES)
def test_split(text: str, reasoning: str, content: str) -> None:
    assert split(text) == (reasoning, content)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "\\boxed{1}"]),
        max_size=12,
    ).map("".join),
    st.data(),
)
def test_any_cut_gives_the_same_split(text: str, data: st.DataObject) -> None:
    splitter, reasoning, content, start = ThinkSplitter(), "", "", 0
    while start < len(text):
        size = data.draw(st.integers(1, 7))
        delta = splitter.feed(text[start : start + size])
        reasoning, content, start = (
            reasoning + delta.reasoning,
            content + delta.content,
            start + size,
        )
    last = splitter.close()
    assert (reasoning + last.reasoning, content + last.content) == split(text)


def test_pieces_arrive_as_early_as_possible() -> None:
    splitter = ThinkSplitter()
    assert splitter.feed("<think>five") == ("five", "")
    assert splitter.feed(" ") == ("", "")
    assert splitter.feed("and </th") == (" and", "")
    assert splitter.feed("ink>\n") == ("", "")
    assert splitter.feed("\\boxed{") == ("", "\\boxed{")
