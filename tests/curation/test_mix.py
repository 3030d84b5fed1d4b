"""Mixes: dataset balance with caps, n-gram balance that raises entropy, determinism."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curation import mix
from curation.mix import MAX_REPEATS, EmptyMix, quotas
from curation.ngrams import Corpus, frequencies, ngram_entropy, ngram_weights, weighted_draw, words
from sailyard.recipe import load_recipe
from sailyard.samples import Sample, read_samples, write_samples
from sailyard.stage.context import StageContext, local_context


def say(name: str, source: str, text: str) -> Sample:
    turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}]
    return Sample(name, source, "caption", turns)


# --- words and n-grams ----------------------------------------------------------------------------


def test_words_splits_marks_and_scripts_without_spaces() -> None:
    assert words("The red-circle, 2x!") == ["the", "red", "-", "circle", ",", "2x", "!"]
    assert words("柱状图：红") == ["柱", "状", "图", "：", "红"]


def test_frequencies_equal_a_count_by_hand() -> None:
    texts = ["a b c", "a b d", "x y z w", "q"]
    corpus = Corpus.of(texts)
    # Openings of two: ab twice, xy, q. Bodies: ab 2, bc, bd, xy, yz, zw, q: 8 in all.
    expected = [
        (2 / 4, (2 + 1) / 2 / 8),
        (2 / 4, (2 + 1) / 2 / 8),
        (1 / 4, 1 / 8),
        (1 / 4, 1 / 8),
    ]
    assert frequencies(corpus, 2) == pytest.approx([np.sqrt(a * b) for a, b in expected])


def test_entropy_equals_its_definition() -> None:
    corpus = Corpus.of(["a b", "a b", "c d", "e f"])
    assert ngram_entropy(corpus, [2]) == pytest.approx({"opening_2": 1.5, "body_2": 1.5})
    assert ngram_entropy(Corpus.of([]), [2]) == {"opening_2": 0.0, "body_2": 0.0}
    assert corpus.take([0, 0, 1]).num_texts == 3
    assert ngram_entropy(corpus.take([0, 0, 1]), [2])["body_2"] == 0.0


def test_n_grams_do_not_cross_texts_and_empty_texts_are_allowed() -> None:
    apart = Corpus.of(["a b", "c d"])
    hashes, valid = apart.hashes(2)
    assert valid.tolist() == [True, False, True, False]
    assert len(set(hashes[valid].tolist())) == 2
    assert ngram_weights(Corpus.of(["", "a b c"]), [2, 3, 4], 0.5, 4.0).shape == (2,)


def test_rare_phrasings_weigh_more_up_to_the_cap() -> None:
    texts = ["the same old words again"] * 400 + ["something rare was said"]
    weights = ngram_weights(Corpus.of(texts), [2, 3, 4], 1.0, 4.0)
    assert weights[-1] == 4.0
    assert weights[0] < 1
    mild = ngram_weights(Corpus.of(texts), [2, 3, 4], 0.1, 1000.0)
    assert mild[0] < mild[-1] < 10


def test_weighted_draw_follows_the_weights_without_repeats() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([1.0] * 50 + [4.0] * 50)
    hits = np.zeros(100)
    for _ in range(300):
        drawn = weighted_draw(weights, 10, rng)
        assert len(set(drawn.tolist())) == 10
        hits[drawn] += 1
    assert 3 < hits[50:].sum() / hits[:50].sum() < 4.5


# --- quotas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "num", "expected"),
    [
        ([600, 300, 100], [1, 1, 1], 1.0, 100, [60, 30, 10]),
        ([900, 100], [1, 1], 0.5, 100, [75, 25]),
        ([100, 100], [3, 1], 1.0, 100, [75, 25]),
        ([1000, 10], [1, 100], 1.0, 500, [480, 10 * MAX_REPEATS]),  # capped, the rest goes over
        ([100, 100], [1, 0], 1.0, 150, [150, 0]),
        ([100, 0], [1, 1], 1.0, 50, [50, 0]),
        ([3, 3, 3], [1, 1, 1], 1.0, 4, [2, 1, 1]),
    ],
)
def test_quotas(
    sizes: list[int], weights: list[float], temperature: float, num: int, expected: list[int]
) -> None:
    assert quotas(sizes, weights, temperature, num) == expected


# --- the stage ------------------------------------------------------------------------------------


def context(tmp_path: Path, name: str, *overrides: str) -> StageContext:
    inputs = {}
    rng = np.random.default_rng(1)
    things = ("red circle", "blue square", "green cross")
    captions = [
        say(f"c{i}", "microworld", "a red circle at the top left, and " + "so on " * (i % 3))
        for i in range(200)
    ]
    captions += [
        say(f"r{i}", "microworld", f"{i} {things[int(rng.random() * 3)]}, rarely put this way {i}")
        for i in range(40)
    ]
    captions += [say(f"u{i}", "user:mine", f"my own words {i}") for i in range(20)]
    sets = {
        "captions": captions,
        "vqa": [say(f"c{i}", "microworld", "yes") for i in range(30)],
        "charts": [say(f"h{i}", "charts", "a bar chart") for i in range(20)],
        "video": [say(f"v{i}", "video", "left") for i in range(10)],
        "instruction": [say(f"i{i}", "instruct-scenes", "3") for i in range(20)],
        "text": [say(f"t{i}", "text", "12") for i in range(20)],
    }
    for key, samples in sets.items():
        folder = tmp_path / "in" / key
        if not folder.exists():
            write_samples(folder, samples)
        inputs[key] = folder
    recipe = load_recipe("micro", overrides)
    return local_context(tmp_path / name, recipe, "curation.mix_multitask", inputs)


def drawn(ctx: StageContext) -> list[Sample]:
    mix.run(ctx)
    return list(read_samples(ctx.output("mix")))


def test_the_mix_is_balanced_reported_and_repeatable(tmp_path: Path) -> None:
    overrides = [
        "curation.mix.multitask.num_samples=120",
        "curation.mix.multitask.temperature=0.5",
        "curation.mix.multitask.weights={video: 2.0}",
        "data.weight=0.5",
    ]
    first = context(tmp_path, "a", *overrides)
    samples = drawn(first)
    assert len(samples) == 120
    assert len({s.id for s in samples}) == 120
    counts = Counter(s.meta["input"] for s in samples)
    report = first.summary_values["sources"]
    mine = report["captions/user:mine"]["drawn"]
    others = counts["captions"] - mine
    assert report["captions/microworld"] == {"available": 240, "drawn": others}
    # sqrt(10) * 2 against sqrt(20): the weighted small set outdraws the larger one.
    assert report["video/video"]["drawn"] > report["text/text"]["drawn"]
    assert mine < report["charts/charts"]["drawn"]
    again = context(tmp_path, "b", *overrides)
    assert [s.id for s in drawn(again)] == [s.id for s in samples]
    shards = [
        [p.read_bytes() for p in sorted(ctx.output("mix").glob("*"))] for ctx in (first, again)
    ]
    assert shards[0] == shards[1]


def test_n_gram_balance_raises_entropy_and_rare_captions(tmp_path: Path) -> None:
    overrides = ["curation.mix.multitask.num_samples=100"]
    ctx = context(tmp_path, "a", *overrides)
    samples = drawn(ctx)
    entropy = ctx.summary_values["ngram_entropy"]
    assert set(entropy["before"]) == {f"{w}_{n}" for w in ("opening", "body") for n in (2, 3, 4)}
    for name, before in entropy["before"].items():
        assert entropy["after"][name] > before
    plain = context(tmp_path, "b", *overrides, "curation.mix.multitask.ngram=null")
    rare = [sum(":r" in s.id for s in group) for group in (samples, drawn(plain))]
    assert rare[0] > 1.3 * rare[1]
    assert "ngram_entropy" not in plain.summary_values


def test_a_mix_of_nothing_is_an_error(tmp_path: Path) -> None:
    weights = (
        "{"
        + ", ".join(
            f"{k}: 0"
            for k in ("captions", "vqa", "charts", "video", "instruction", "text", "microworld")
        )
        + "}"
    )
    ctx = context(tmp_path, "a", f"curation.mix.multitask.weights={weights}")
    with pytest.raises(EmptyMix, match="mix_multitask"):
        mix.run(ctx)
