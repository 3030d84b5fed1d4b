"""Questions against an answerer written apart from their generators; captions and the grammar."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from curation.oracle import score_caption
from curation.vqa import caption_questions
from curation.world.answering import agrees, answer_question
from curation.world.grammar import ClaimedThing, parse_caption
from curation.world.items import SOURCES, caption_of, questions_of, sample_subject
from curation.world.questions import ask_box, ask_count, ask_existence, ask_relation
from curation.world.scene import CELLS, Scene, Thing, sample_scene

SCENE = Scene(
    (
        Thing(0, "circle", "red", 0.17, 0.17, 0.24),
        Thing(4, "square", "blue", 0.5, 0.5, 0.25),
        Thing(8, "square", "red", 0.83, 0.83, 0.25),
    ),
    (240, 240, 240),
    0,
)


@pytest.mark.parametrize("source", SOURCES)
def test_every_generated_answer_is_the_answer(source: str) -> None:
    rng = np.random.default_rng(1)
    asked = 0
    for _ in range(240):
        subject = sample_subject(source, rng)
        for qa in questions_of(subject, rng, 8):
            asked += 1
            assert agrees(qa.answer, answer_question(qa.question, subject.meta())), qa
    assert asked > 200


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How many objects are there?", "3"),
        ("How many red objects are there?", "2"),
        ("Count the squares.", "2"),
        ("How many crosses are there?", "0"),
        ("Is there a red square?", "yes"),
        ("Can you see a blue circle?", "no"),
        ("What colour is the object in the center?", "blue"),
        ("Name the shape of the object at the top left.", "circle"),
        ("What colour is the circle?", "red"),
        ("What colour is the square?", None),  # there are two
        ("What shape is the object at the top right?", None),  # there is none
        ("Is the red circle above the blue square?", "yes"),
        ("Does the red square lie to the left of the red circle?", "no"),
        ("Where is the blue square?", "center"),
        (
            "Name things by place.",
            "top left: red circle, center: blue square, bottom right: red square",
        ),
        ("What is the box of the red circle?", "<box>(50,50),(290,290)</box>"),
        ("What is the meaning of it all?", None),
        ("<image>\nCount the objects.\nAnswer the question using a single word.", "3"),
    ],
)
def test_answers_from_words_and_truth(question: str, answer: str | None) -> None:
    assert answer_question(question, SCENE.meta()) == answer


def test_chains_end_in_the_answer_and_name_only_what_is_there() -> None:
    rng = np.random.default_rng(2)
    any_cell = "|".join(sorted(CELLS, key=len, reverse=True))
    for _ in range(100):
        scene = sample_scene(rng)
        places = {(t.colour, t.shape, CELLS[t.cell]) for t in scene.things}
        for qa in (ask_count(scene, rng), ask_existence(scene, rng), ask_relation(scene, rng)):
            if qa is None:
                continue
            assert qa.chain
            named = re.findall(rf"\b[Aa] (\w+) (\w+) (?:at|in) the ({any_cell})\b", qa.chain)
            assert set(named) <= places
            if qa.skill == "count":
                assert re.findall(r"\d+", qa.chain)[-1] == qa.answer
            assert qa.thinking() == f"<think>{qa.chain}</think>\n\\boxed{{{qa.answer}}}"


def test_relations_are_asked_of_objects_that_are_clearly_apart() -> None:
    rng = np.random.default_rng(3)
    column = Scene(
        tuple(
            Thing(c, "circle", n, 0.5, y, 0.2) for c, n, y in ((1, "red", 0.2), (7, "blue", 0.8))
        ),
        (255, 255, 255),
        0,
    )
    kinds = {qa.kind for _ in range(60) if (qa := ask_relation(column, rng)) is not None}
    assert kinds == {"relation.row"}


def test_boxes_are_asked_of_unique_names_only() -> None:
    twins = Scene(
        (Thing(0, "cross", "red", 0.2, 0.2, 0.2), Thing(8, "cross", "red", 0.8, 0.8, 0.2)),
        (255, 255, 255),
        0,
    )
    assert ask_box(twins, np.random.default_rng(0)) is None


def test_counts_cover_one_to_four_without_a_dominant_answer() -> None:
    rng = np.random.default_rng(4)
    seen = Counter(ask_count(sample_scene(rng), rng).answer for _ in range(600))
    assert {"1", "2", "3", "4"} <= set(seen)
    assert max(seen.values()) / 600 < 0.45


@pytest.mark.parametrize("source", SOURCES)
def test_true_captions_parse_completely_and_score_full_alignment(source: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        subject = sample_subject(source, rng)
        caption = caption_of(subject, rng)
        assert parse_caption(caption).num_unparsed == 0, caption
        assert score_caption(subject.meta(), caption).ita == 5, caption


def test_grammar_reads_what_is_said_and_counts_what_it_cannot_read() -> None:
    claims = parse_caption("2 objects: a red circle at the top left, an object, a gre")
    assert claims.kind == "scene"
    assert claims.count == 2
    assert claims.num_unparsed == 1
    assert claims.things == [ClaimedThing("red", "circle", 0), ClaimedThing(None, None, None)]
    assert parse_caption("some shapes").kind == ""
    assert parse_caption('the word "sail" in blue').facts == {("word", "sail"), ("ink", "blue")}


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "charts"])
def test_questions_from_a_true_caption_are_right_about_the_image(source: str) -> None:
    rng = np.random.default_rng(6)
    num = 0
    for _ in range(40):
        subject = sample_subject(source, rng)
        for qa in caption_questions(caption_of(subject, rng), rng, 4):
            num += 1
            assert agrees(qa.answer, answer_question(qa.question, subject.meta()))
    assert num > 60


def test_questions_from_a_wrong_caption_follow_the_caption_not_the_image() -> None:
    rng = np.random.default_rng(7)
    qas = caption_questions("a green cross at the top right", rng, 8)
    answers = {qa.question: qa.answer for qa in qas}
    assert answers
    assert not any("red" in a for a in answers.values())
    assert caption_questions("a nice picture", rng, 4) == []
