"""Chains of the small world: true ones hold, each kind of slip is caught by its own verdict."""

from __future__ import annotations

import pytest

from evaluation.soundness import check_chain

SCENE = {
    "kind": "scene",
    "things": [
        {"cell": 0, "shape": "circle", "colour": "red", "box": [0, 0, 200, 200]},
        {"cell": 4, "shape": "square", "colour": "blue", "box": [400, 400, 600, 600]},
        {"cell": 5, "shape": "circle", "colour": "blue", "box": [700, 400, 900, 600]},
    ],
}
DIGITS = {"kind": "digits", "digits": [3, 4]}
SEEN = (
    "I see a red circle at the top left, a blue square in the center, "
    "a blue circle at the middle right."
)
COUNT = "How many blue objects are there?"
BLUE = "Of these, a blue square in the center, a blue circle at the middle right count."
SUM = "The left digit is 3. The right digit is 4."
RELATION = "Is the red circle above the blue square?"
ABOVE = "So the red circle is above the blue square."
PLACES = "The red circle is at the top left. The blue square is in the center."


def reply(chain: str, answer: str) -> str:
    return f"<think>{chain}</think>\n\\boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("chain", "answer", "question", "scene"),
    [
        (f"{SEEN} That is 3 objects.", "3", "How many objects are there?", SCENE),
        (f"{SEEN} {BLUE} That is 2.", "2", COUNT, SCENE),
        (f"{SEEN} None of these counts. That is 0.", "0", "Count the crosses.", SCENE),
        (f"{SUM} 3 + 4 = 7.", "7", "Add the two digits.", DIGITS),
        (f"{PLACES} {ABOVE}", "yes", RELATION, SCENE),
        (f"{SEEN} There is a red circle.", "yes", "Is there a red circle?", SCENE),
        (f"{SEEN} There is no green circle.", "no", "Is there a green circle?", SCENE),
        (
            "As the nearest to a green square I see a blue square in the center. "
            "Asked: green square. Found: blue square. There is no green square.",
            "no",
            "Is there a green square?",
            SCENE,
        ),
        (f"{PLACES} {ABOVE} Asked: above. Found: above.", "yes", RELATION, SCENE),
    ],
)
def test_true_chains_hold(chain: str, answer: str, question: str, scene: dict[str, object]) -> None:
    verdict = check_chain(reply(chain, answer), question, scene)
    assert verdict.holds, verdict


@pytest.mark.parametrize(
    ("chain", "answer", "question", "scene", "broken"),
    [
        (f"{SUM} 3 + 4 = 8.", "8", "Add the two digits.", DIGITS, "sound"),
        (f"{SUM} 2 + 5 = 7.", "7", "Add the two digits.", DIGITS, "sound"),
        ("The left digit is 2. The right digit is 5. 2 + 5 = 7.", "7", "", DIGITS, "grounded"),
        (f"{SUM} 3 + 4 = 7.", "9", "Add the two digits.", DIGITS, "consistent"),
        (f"{SEEN} That is 4 objects.", "4", "", SCENE, "sound"),
        (f"{SEEN} {BLUE} That is 3.", "3", COUNT, SCENE, "sound"),
        ("I see a red circle at the top left. That is 1 object.", "1", "", SCENE, "grounded"),
        (f"{SEEN.replace('red', 'green')} That is 3 objects.", "3", "", SCENE, "grounded"),
        (f"{PLACES} So the red circle is below the blue square.", "no", RELATION, SCENE, "sound"),
        (
            f"{PLACES} So the red circle is above the blue square.",
            "no",
            RELATION,
            SCENE,
            "consistent",
        ),
        (f"{SEEN} There is a green circle.", "yes", "", SCENE, "sound"),
        ("It is clear.", "7", "", DIGITS, "sound"),
    ],
)
def test_slips_are_caught(
    chain: str, answer: str, question: str, scene: dict[str, object], broken: str
) -> None:
    verdict = check_chain(reply(chain, answer), question, scene)
    assert getattr(verdict, broken) is False
    assert not verdict.holds


def test_without_a_scene_only_logic_is_judged() -> None:
    verdict = check_chain(reply("2 + 2 = 4.", "4"), "What is 2 + 2?", {})
    assert verdict.holds
    assert not check_chain("4", "What is 2 + 2?", {}).holds
