"""What a reply says and whether it is right: extraction and rule checks, without torch.

The extraction order is that of the released model's evaluation adapter (spec 2.6): a closed
think block followed by ``\\boxed{}`` wins, else the last ``\\boxed{}``, else the reply itself.
RL rewards, data selection and the evaluation suite all judge with these functions, so a reply
cannot be right in one room and wrong in another.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal, get_args

Check = Literal["exact", "number", "box", "math"]
Box = tuple[float, float, float, float]

CHECKS: tuple[str, ...] = get_args(Check)
BOX_IOU = 0.5  # RefCOCO's convention; the paper does not name its threshold (spec 6.1)
MATH_SECONDS = 5.0  # of processor time: a hostile expression must not hang a rollout

# Skills whose answer takes steps; every other skill is perception (spec 3.9 treats them apart).
REASONING_SKILLS = ("count", "existence", "relation", "sum")

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_BOXED = "\\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_BOX_TAGS = re.compile(r"</?(?:box|ref|quad)>")
_EDGES = " \t\r\n\"'`.,;:!?*$"


class UnknownCheck(ValueError):
    """The item asks for a check that no rule performs."""

    def __init__(self, check: str) -> None:
        super().__init__(
            f"no rule checks {check!r}; use one of {', '.join(CHECKS)}, "
            "or send open answers to a judge model"
        )


def boxed_contents(text: str) -> list[str]:
    """Contents of every closed ``\\boxed{}``, in order; braces may nest to any depth."""
    found: list[str] = []
    start = text.find(_BOXED)
    while start != -1:
        depth, position = 1, start + len(_BOXED)
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if depth == 0:
            found.append(text[start + len(_BOXED) : position - 1].strip())
        start = text.find(_BOXED, start + len(_BOXED))
    return found


def extract_answer(text: str) -> str:
    """The final answer inside a reply, stripped.

    An unfinished think block without any ``\\boxed{}`` holds no answer and gives "".
    """
    _, closed, tail = text.rpartition(THINK_CLOSE)
    if closed:
        after = boxed_contents(tail)
        if after:
            return after[-1]
    anywhere = boxed_contents(text)
    if anywhere:
        return anywhere[-1]
    if closed:
        return tail.strip()
    return "" if THINK_OPEN in text else text.strip()


def extract_thinking(text: str) -> str:
    """What stands inside the think block, stripped; "" where there is none.

    A block cut off by the token budget gives all that was thought so far.
    """
    _, opened, rest = text.partition(THINK_OPEN)
    return rest.partition(THINK_CLOSE)[0].strip() if opened else ""


def format_reward(text: str) -> bool:
    """True when the reply is one non-empty think block followed by one filled ``\\boxed{}``.

    Nothing but white space may stand before the block (paper 4.2.3: "properly inside").
    """
    reply = text.strip()
    if not reply.startswith(THINK_OPEN):
        return False
    if reply.count(THINK_OPEN) != 1 or reply.count(THINK_CLOSE) != 1:
        return False
    thinking, _, tail = reply[len(THINK_OPEN) :].partition(THINK_CLOSE)
    contents = boxed_contents(tail)
    return bool(thinking.strip()) and len(contents) == 1 and bool(contents[0])


def normalise(text: str) -> str:
    """Case-folded, single-spaced text without quotes and punctuation at its edges."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def parse_number(text: str) -> float | None:
    """The one number in ``text``; None where there is none or more than one."""
    found = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def parse_box(text: str) -> Box | None:
    """(x1, y1, x2, y2) in 0-1000; None unless exactly four numbers span an area.

    Coordinates within 0-1 are accepted and scaled, as the paper's evaluation does (spec 6.1).
    """
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", _BOX_TAGS.sub(" ", text))]
    if len(numbers) != 4:
        return None
    if max(numbers) <= 1.0:
        numbers = [1000.0 * n for n in numbers]
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared)


def is_correct(prediction: str, answer: str, check: str) -> bool:
    """Whether a reply (whole text or bare answer) is right under the item's rule.

    Raises:
        UnknownCheck: for "open" and for anything else without a rule.
    """
    if check not in CHECKS:
        raise UnknownCheck(check)
    given = extract_answer(prediction)
    if not given:
        return False
    if check == "exact":
        return normalise(given) == normalise(answer)
    if check == "number":
        left, right = parse_number(given), parse_number(answer)
        return left is not None and right is not None and abs(left - right) < 1e-6
    if check == "box":
        guess, truth = parse_box(given), parse_box(answer)
        return guess is not None and truth is not None and iou(guess, truth) >= BOX_IOU
    return _math_equal(given, answer)


def _math_equal(given: str, answer: str) -> bool:
    if normalise(given) == normalise(answer):
        return True
    # Imported here: sympy takes half a second and most items need no algebra.
    from math_verify import parse, verify

    # Its own limits go by the clock on the wall: a machine that pauses would make right answers
    # wrong. It warns when they are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        with _at_most(MATH_SECONDS):
            truth = parse(f"${answer}$", parsing_timeout=None)
            guess = parse(f"${given[:500]}$", parsing_timeout=None)
            return bool(verify(truth, guess, timeout_seconds=None))
    except _TooLong:
        return False


class _TooLong(BaseException):
    """The algebra took too long. No Exception: sympy catches those, and goes on."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` in the block once this thread has computed for so long.

    Only the main thread can be interrupted: in any other the block runs to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    until = time.thread_time() + seconds

    def check(_number: int, _frame: FrameType | None) -> None:
        # The timer counts all threads of the process; others may have used it up.
        if time.thread_time() >= until:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            raise _TooLong

    before = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds / 10, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
