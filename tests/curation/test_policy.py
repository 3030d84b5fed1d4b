"""Prompts of the RL pool: suffix, multiple choice to free response, rates and fates."""

from __future__ import annotations

from collections import Counter

import pytest

from curation.policy import Asked, BadPrompt, as_prompt, is_right, rate_histogram, rewrite_options
from curation.rl_data import KEPT, TOO_EASY, TOO_HARD, fate
from curation.think_fusion import best_thought, verdict
from model.chat import THINKING_SUFFIX
from model.generation import Completion
from sailyard.samples import Sample


def item(skill: str = "sum", question: str = "Add the two digits.", answer: str = "7") -> Sample:
    content = f"<image>\n{question}"
    return Sample(
        id="p",
        source="digits",
        task=skill,
        messages=[{"role": "user", "content": content}],
        images=[b"x"],
        meta={
            "skill": skill,
            "answer": answer,
            "check": "number",
            "scene": {"kind": "digits", "digits": [3, 4]},
        },
    )


def reply(text: str, finished: bool = True, logprob: float = -0.1) -> Completion:
    return Completion(text, [1, 2], [logprob, logprob], finished)


GOOD = "<think>The left digit is 3. The right digit is 4. 3 + 4 = 7.</think>\n\\boxed{7}"
LUCKY = "<think>The left digit is 3. The right digit is 4. 2 + 5 = 7.</think>\n\\boxed{7}"


def test_the_suffix_stands_once() -> None:
    asked = as_prompt(item(), think=True)
    assert asked.messages[-1]["content"].endswith("\n" + THINKING_SUFFIX)
    again = as_prompt(asked, think=True)
    assert again.messages == asked.messages
    assert as_prompt(asked, think=False).messages == item().messages


def test_an_answered_item_loses_its_answer() -> None:
    sample = item()
    sample.messages.append({"role": "assistant", "content": "7"})
    assert as_prompt(sample, think=False).messages == item().messages
    del sample.meta["check"]
    with pytest.raises(BadPrompt, match="'p' has no 'check'"):
        as_prompt(sample, think=False)


def test_numeric_choices_become_free_questions() -> None:
    options = "Add the two digits.\nA. 3\nB. 7\n(C) 9\nD: 11"
    free = rewrite_options(item(question=options, answer="B"))
    assert free is not None
    assert free.messages[0]["content"] == "<image>\nAdd the two digits."
    assert free.meta["answer"] == "7"
    assert free.meta["check"] == "number"


def test_worded_choices_and_plain_questions_stay() -> None:
    worded = "What is shown?\nA. a red house\nB. a blue house"
    assert rewrite_options(item(question=worded, answer="A")) is None
    assert rewrite_options(item()) is None


def test_symbolic_choices_become_free_questions() -> None:
    free = rewrite_options(item(question="Area?\nA. 2\\pi r\nB. \\frac{1}{2}x^2", answer="B"))
    assert free is not None
    assert (free.meta["answer"], free.meta["check"]) == ("\\frac{1}{2}x^2", "math")


def test_thinking_prompts_need_a_boxed_answer() -> None:
    thinking, direct = as_prompt(item(), think=True), as_prompt(item(), think=False)
    assert is_right(reply(GOOD), thinking)
    assert not is_right(reply("7"), thinking)
    assert is_right(reply("7"), direct)


@pytest.mark.parametrize(
    ("skill", "right", "expected"),
    [
        ("sum", [True, True, True, True], TOO_EASY),
        ("sum", [False, False, False, False], TOO_HARD),
        ("sum", [True, False, False, False], KEPT),
        ("colour", [True, True, True, True], TOO_EASY),
        ("colour", [False, False, False, False], KEPT),
    ],
)
def test_which_prompts_stay(skill: str, right: list[bool], expected: str) -> None:
    assert fate(Asked(0, item(skill), [reply("")] * 4, right)) == expected


def test_rejection_sampling_names_its_reason() -> None:
    prompt = as_prompt(item(), think=True)
    assert verdict(reply(GOOD), True, prompt) == "accepted"
    assert verdict(reply(LUCKY), True, prompt) == "unsound"
    assert verdict(reply(GOOD), False, prompt) == "wrong"
    assert verdict(reply(GOOD, finished=False), True, prompt) == "malformed"
    assert verdict(reply("7"), True, prompt) == "malformed"


def test_the_surest_sound_thought_is_kept() -> None:
    prompt = as_prompt(item(), think=True)
    replies = [reply(LUCKY, logprob=-0.01), reply(GOOD, logprob=-0.5), reply(GOOD, logprob=-0.2)]
    asked = Asked(0, prompt, replies, [True, True, True])
    tally: Counter[str] = Counter()
    best = best_thought(asked, tally)
    assert best is not None
    assert best.messages[-1] == {"role": "assistant", "content": GOOD}
    assert best.meta["think"] is True
    assert tally == {"unsound": 1, "accepted": 2}
    assert best_thought(Asked(0, prompt, [reply("7")], [False]), tally) is None


def test_rates_are_counted() -> None:
    assert rate_histogram([0.25, 0.0, 0.25]) == {"0.00": 1, "0.25": 2}
