"""Ids become text without broken characters, and stop strings never leak, however tokens fall."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.reply import Reply, Sampling

END = 256


def decode(ids: Sequence[int]) -> str:
    """A byte-level tokenizer at its plainest: one token per byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def write(data: bytes, sampling: Sampling, end: bool = True) -> tuple[str, Reply]:
    reply = Reply(decode, frozenset({END}), sampling)
    text = ""
    for token in [*data, *([END] if end else [])]:
        text += reply.push(token)
        if reply.finish:
            break
    return text, reply


def test_characters_of_several_bytes_arrive_whole() -> None:
    reply = Reply(decode, frozenset({END}), Sampling(max_tokens=100))
    pieces = [reply.push(byte) for byte in "a好🙂".encode()]
    assert pieces == ["a", "", "", "好", "", "", "", "🙂"]


def test_broken_bytes_are_shown_in_the_end() -> None:
    text, reply = write(b"ok\xf0\x9f", Sampling(max_tokens=100))
    assert text == "ok\ufffd"
    assert reply.finish == "stop"


def test_length_is_counted_in_tokens() -> None:
    text, reply = write(b"abcdef", Sampling(max_tokens=4), end=False)
    assert (text, reply.finish, reply.num_tokens) == ("abcd", "length", 4)


def test_held_text_comes_out_at_the_end() -> None:
    text, reply = write(b"a EN", Sampling(max_tokens=100, stops=("END",)))
    assert (text, reply.finish) == ("a EN", "stop")
    text, reply = write(b"a EN", Sampling(max_tokens=4, stops=("END",)), end=False)
    assert (text, reply.finish) == ("a EN", "length")


@settings(max_examples=200, deadline=None)
@given(
    st.text("abé\n", max_size=20), st.lists(st.text("abé\n", min_size=1, max_size=3), max_size=3)
)
def test_reply_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    written, reply = write(text.encode(), Sampling(max_tokens=1000, stops=tuple(stops)))
    # The earliest moment a stop string is complete decides; of those complete then, the one that
    # begins first.
    expected = text
    for size in range(1, len(text) + 1):
        found = [at for stop in stops if (at := text[:size].find(stop)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert written == expected
    assert reply.finish == "stop"
