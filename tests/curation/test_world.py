"""MicroWorld: the split of layouts, rendering, truth and determinism."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.world.build import QUESTIONS, heldout_samples, reference_samples
from curation.world.digits import sample_digits
from curation.world.draw import encode
from curation.world.items import MOST_TURNS, SOURCES, ask_skill, render, sample_subject
from curation.world.motion import DIRECTIONS, sample_motion
from curation.world.plots import sample_chart
from curation.world.questions import scene_questions
from curation.world.scene import COLOURS, Scene, Thing, in_heldout, layout_key, sample_scene
from curation.world.shorthand import compounds, shorthand
from curation.world.sources import prompt_pool, raw_captions, raw_clips, raw_instructions
from curation.world.text import text_samples
from curation.world.words import LEXICON
from sailyard.samples import SKILLS, Sample, check_sample, write_samples

SIZE = 84


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def keys(samples: list[Sample]) -> set[str]:
    return {s.meta["scene"]["key"] for s in samples if "scene" in s.meta}


def everything(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    counts = {"microworld": 60, "digits": 10, "words": 10, "photos": 10}
    return [
        *reference_samples(60, rng, SIZE),
        *raw_captions(counts, rng, SIZE, 0.2),
        *raw_clips(25, rng, SIZE),
        *raw_instructions(60, rng, SIZE, 0.5),
        *prompt_pool(60, rng, SIZE),
    ]


def test_training_and_heldout_share_no_layout() -> None:
    heldout = keys(list(heldout_samples(8, np.random.default_rng(1), SIZE)))
    training = keys(everything(2))
    assert heldout
    assert training
    assert not heldout & training
    # Digits are split by scan, see below; all else by its layout.
    assert all(in_heldout(key) for key in heldout if not key.startswith("digits:"))
    assert not any(in_heldout(key) for key in training if not key.startswith("digits:"))


def test_the_side_of_a_layout_depends_on_the_layout_alone() -> None:
    triples = [(4, "circle", "red"), (0, "square", "blue")]
    assert layout_key(triples) == layout_key(reversed(triples))
    rng = np.random.default_rng(0)
    share = np.mean([in_heldout(sample_scene(rng).key()) for _ in range(20)])
    assert share == 0.0
    moved = [in_heldout(sample_scene(rng, heldout=True).key()) for _ in range(20)]
    assert all(moved)


def test_digits_of_the_two_sides_are_different_scans() -> None:
    rng = np.random.default_rng(3)
    train = {i for _ in range(300) for i in sample_digits(rng, 2).instances}
    held = {i for _ in range(300) for i in sample_digits(rng, 2, heldout=True).instances}
    assert len(held) > 100
    assert not train & held


def test_every_object_is_drawn_where_its_box_says() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = sample_scene(rng)
        image = pixels(render(scene, SIZE).images[0])
        for thing in scene.things:
            x1, y1, x2, y2 = (round(c / 1000 * SIZE) for c in thing.box())
            near = np.abs(image - COLOURS[thing.colour]).sum(axis=2) < 60
            inside = near[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1]
            assert inside.sum() > 0.15 * (x2 - x1) * (y2 - y1)
            assert near[:, max(0, x1 - 1) : x2 + 1].any()
            assert near[max(0, y1 - 1) : y2 + 1].any()


def test_jitter_and_size_vary_inside_a_cell() -> None:
    rng = np.random.default_rng(5)
    things = [t for _ in range(300) for t in sample_scene(rng).things if t.cell == 4]
    assert np.ptp([t.x for t in things]) > 4 / SIZE
    assert np.ptp([t.size for t in things]) > 4 / SIZE


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [84, 224])
def test_every_source_renders_at_the_asked_size(source: str, size: int) -> None:
    item = render(sample_subject(source, np.random.default_rng(6)), size)
    assert all(Image.open(io.BytesIO(data)).size == (size, size) for data in item.images)
    assert (len(item.images) > 1) == (source == "video")


def test_png_writer_keeps_every_pixel() -> None:
    rng = np.random.default_rng(15)
    for shape in ((84, 84, 3), (3, 5, 3), (1, 1, 3)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        data = encode(Image.fromarray(image))
        assert (pixels(data) == image).all()
        assert data == encode(Image.fromarray(image))


def test_moving_objects_move_the_stated_way_in_visible_steps() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        motion = sample_motion(rng)
        frames = [pixels(data) for data in render(motion, SIZE).images]
        assert 2 <= len(frames) <= 8
        changed = np.abs(frames[-1] - frames[0]).sum(axis=2) > 60
        rows, columns = np.nonzero(changed)
        dx, _dy = DIRECTIONS[motion.direction]
        width, height = np.ptp(columns), np.ptp(rows)
        assert (width > height) == (dx != 0), motion.direction
        assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_heldout_asks_every_skill_with_balanced_yes_and_no() -> None:
    samples = list(heldout_samples(40, np.random.default_rng(8), SIZE))
    assert [sum(s.meta["skill"] == skill for s in samples) for skill in SKILLS] == [40] * 12
    for skill in ("existence", "relation"):
        answers = [s.meta["answer"] for s in samples if s.meta["skill"] == skill]
        assert 0.25 < answers.count("yes") / len(answers) < 0.75
    for sample in samples:
        check_sample(sample)
        assert sample.messages[-1]["content"] == sample.meta["answer"]


def test_reference_asks_and_captions_in_conversations_of_their_own() -> None:
    samples = list(reference_samples(40, np.random.default_rng(9), SIZE))
    asked = [s for s in samples if s.task != "caption"]
    described = {tuple(s.images): s for s in samples if s.task == "caption"}
    assert 40 < len(asked) <= 40 * QUESTIONS
    assert 8 <= len(described) <= 32
    turns = [sum(m["role"] == "user" for m in s.messages) for s in asked]
    assert max(turns) <= MOST_TURNS
    assert 0.8 < turns.count(1) / len(turns) < 1  # now and then a longer conversation
    for sample in asked:
        if caption := described.get(tuple(sample.images)):
            # No answer can be read off the conversation before it is asked.
            assert caption.meta["caption"] not in str(sample.messages)
    tagged = [s for s in asked if "tags" in s.meta]
    assert len({tuple(s.images) for s in tagged}) == len(tagged) == 40


def test_samples_are_sound_and_ids_unique() -> None:
    samples = everything(10)
    for sample in samples:
        check_sample(sample)
    assert len({s.id for s in samples}) == len(samples)


def test_same_seed_same_shards_other_seed_other_shards(tmp_path: Path) -> None:
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        write_samples(tmp_path / name, everything(seed), shard_size=100)
        rng = np.random.default_rng(seed)
        write_samples(tmp_path / f"{name}-text", text_samples(50, rng))

    def bytes_of(name: str) -> list[bytes]:
        return [p.read_bytes() for p in sorted((tmp_path / name).glob("*.parquet"))]

    assert bytes_of("a") == bytes_of("b") != bytes_of("c")
    assert bytes_of("a-text") == bytes_of("b-text") != bytes_of("c-text")


def test_a_scene_of_twins_always_has_something_to_be_asked() -> None:
    left, right = (Thing(cell, "triangle", "yellow", 0.17, 0.5, 0.24) for cell in (0, 6))
    twins = Scene((left, right), (243, 242, 240), 0.0)  # no name, box or relation is unique
    rng = np.random.default_rng(0)
    assert all(scene_questions(twins, rng, 1) for _ in range(300))


def test_size_does_not_change_what_is_in_the_world() -> None:
    small, large = (
        [s.messages for s in reference_samples(10, np.random.default_rng(13), size)]
        for size in (84, 112)
    )
    assert small == large


def test_unknown_skill_and_source_are_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="taste"):
        ask_skill("taste", rng)
    with pytest.raises(ValueError, match="smells"):
        sample_subject("smells", rng)
    with pytest.raises(ValueError, match="radar"):
        sample_chart(rng, kind="radar")


def test_text_corpus_teaches_thinking_and_keeps_heldout_out() -> None:
    samples = list(text_samples(400, np.random.default_rng(14)))
    assert all(not s.images and s.source == "text" for s in samples)
    thinking = [s for s in samples if s.meta["think"]]
    assert 0.25 < len(thinking) / len(samples) < 0.5
    for sample in thinking:
        assert sample.messages[1]["content"].startswith("<think>")
        assert "</think>\n\\boxed{" in sample.messages[1]["content"]


def test_every_word_of_shorthand_is_plain_or_lists_its_parts() -> None:
    rng = np.random.default_rng(21)
    known = compounds()
    for source in SOURCES:
        for _ in range(30):
            subject = sample_subject(source, rng)
            lines = re.findall(r"\[ (.*) \]", shorthand(subject))
            assert len(lines) == (subject.num_frames if source == "video" else 1)
            for line in lines:
                words = line.split()
                assert len(words) == 9
                plain = [w for w in words if w not in known]
                assert set(plain) <= {"blank", *LEXICON, *"0123456789"}
    assert known["topleftredcircle"] == ("top left", "red", "circle")


def test_heldout_yes_no_questions_are_half_yes() -> None:
    samples = list(heldout_samples(10, np.random.default_rng(3), SIZE))
    for skill in ("existence", "relation"):
        answers = [s.meta["answer"] for s in samples if s.meta["skill"] == skill]
        assert answers.count("yes") == answers.count("no") == 5
