"""Extraction order, rule checks and the format reward."""

from __future__ import annotations

import signal
import threading
import time

import math_verify
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import answers
from evaluation.answers import (
    UnknownCheck,
    extract_answer,
    extract_thinking,
    format_reward,
    iou,
    is_correct,
    parse_box,
)

COT = "<think>There are 2 red and 1 blue.\n2 + 1 = 3.</think>\n\\boxed{3}"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (COT, "3"),
        ("<think>\\boxed{9}</think> so \\boxed{3}", "3"),
        ("first \\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("  red. ", "red."),
        ("<think>a</think> red", "red"),
        ("<think>never closed 3", ""),
        ("\\boxed{open", "\\boxed{open"),
        ("", ""),
    ],
)
def test_extract_answer(reply: str, answer: str) -> None:
    assert extract_answer(reply) == answer


def test_extract_thinking() -> None:
    assert extract_thinking(COT).endswith("2 + 1 = 3.")
    assert extract_thinking("<think>cut off") == "cut off"
    assert extract_thinking("3") == ""


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        (COT, True),
        ("\\boxed{3}", False),
        ("<think></think>\\boxed{3}", False),
        ("<think>a</think>3", False),
        ("<think>a</think>\\boxed{}", False),
        ("<think>a</think>\\boxed{1}\\boxed{2}", False),
        ("Sure. <think>a</think>\\boxed{3}", False),
        ("<think>a<think>b</think>\\boxed{3}", False),
    ],
)
def test_format_reward(reply: str, good: bool) -> None:
    assert format_reward(reply) is good


@pytest.mark.parametrize(
    ("reply", "answer", "check", "good"),
    [
        ("Red.", "red", "exact", True),
        ("light  Blue", "light blue", "exact", True),
        ("yes, it is", "yes", "exact", False),
        ("", "", "exact", False),
        ("3", "3", "number", True),
        ("There are 3 of them", "3", "number", True),
        ("3 or 4", "3", "number", False),
        ("1,234", "1234", "number", True),
        ("-2.50", "-2.5", "number", True),
        (COT, "3", "number", True),
        ("<box>(100,100),(200,200)</box>", "<box>(110,100),(210,200)</box>", "box", True),
        ("(0.1,0.1),(0.2,0.2)", "<box>(100,100),(200,200)</box>", "box", True),
        ("<box>(100,100),(200,200)</box>", "<box>(160,100),(260,200)</box>", "box", False),
        ("<box>(200,200),(100,100)</box>", "<box>(100,100),(200,200)</box>", "box", False),
        ("a box", "<box>(100,100),(200,200)</box>", "box", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", "math", True),
        ("\\boxed{x+1}", "1+x", "math", True),
        ("\\boxed{x+2}", "1+x", "math", False),
    ],
)
def test_is_correct(reply: str, answer: str, check: str, good: bool) -> None:
    assert is_correct(reply, answer, check) is good


def test_math_works_outside_the_main_thread() -> None:
    results: list[bool] = []
    worker = threading.Thread(
        target=lambda: results.append(is_correct("\\boxed{2/4}", "1/2", "math"))
    )
    worker.start()
    worker.join()
    assert results == [True]


@pytest.mark.slow
def test_algebra_that_does_not_end_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MATH_SECONDS", 1.0)
    before = signal.getsignal(signal.SIGVTALRM)
    assert not is_correct("\\boxed{9^{9^{9}}}", "3", "math")
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.slow
def test_a_machine_that_pauses_makes_no_answer_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = math_verify.parse

    def paused(text: str, **options: object) -> object:
        time.sleep(1.5)
        return parse(text, **options)

    assert is_correct("\\boxed{2/4}", "1/2", "math")  # what the first one loads is no pause
    monkeypatch.setattr(math_verify, "parse", paused)
    monkeypatch.setattr(answers, "MATH_SECONDS", 1.0)
    assert is_correct("\\boxed{2/4}", "1/2", "math")


def test_unknown_check_names_itself() -> None:
    with pytest.raises(UnknownCheck, match=r"'open'.*judge"):
        is_correct("a", "a", "open")


coordinate = st.integers(0, 999)


@given(coordinate, coordinate, coordinate, coordinate)
def test_a_box_matches_itself(x: int, y: int, width: int, height: int) -> None:
    box = (float(x), float(y), float(x + width + 1), float(y + height + 1))
    text = f"<box>({x},{y}),({x + width + 1},{y + height + 1})</box>"
    assert iou(box, box) == 1.0
    assert max(box) <= 1 or parse_box(text) == box


@given(st.text(max_size=60))
def test_extraction_never_raises_and_is_stable(text: str) -> None:
    answer = extract_answer(text)
    if "\\boxed{" not in text and "<think>" not in text and "</think>" not in text:
        assert extract_answer(answer) == answer
