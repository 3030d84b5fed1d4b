"""Instruction curation: repetitions, contradicted sources, re-annotation, the whole stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from curation import instruction, probe
from curation.world.sources import raw_instructions
from sailyard.samples import Sample, SampleReader
from sailyard.stage import local_context
from tests.evaluation.tiny import SIZE, micro_recipe, pool, save_tiny, tiny_model, write


def raw(num: int, noise: float = 0.5) -> list:
    return list(raw_instructions(num, np.random.default_rng(3), SIZE, noise))


def test_repetitions_are_counted_and_dropped(tmp_path: Path) -> None:
    samples = pool(4, skills=("count",))
    twin = pool(4, skills=("count",))
    for sample in twin:
        sample.id += "-again"
    reader = SampleReader(write(tmp_path / "raw", [*samples, *twin]))
    positions, reports = instruction.group(reader)
    assert sum(map(len, positions.values())) == 4
    assert sum(report.duplicates for report in reports.values()) == 4


def test_answers_are_written_anew_from_the_truth() -> None:
    (sample,) = pool(1, skills=("colour",))
    truth = sample.meta["answer"]
    assert instruction.reannotate(sample) == "confirmed"
    sample.messages[-1]["content"] = "mauve"
    assert instruction.reannotate(sample) == "corrected"
    assert sample.messages[-1]["content"] == truth
    sample.meta = {}
    assert instruction.reannotate(sample) == "unknown"


def fact(number: int, answer: str) -> Sample:
    messages = [
        {"role": "user", "content": f"Which colour is object {number}?"},
        {"role": "assistant", "content": answer},
    ]
    return Sample(f"fact-{number}", "facts", "colour", messages)


def test_a_taught_model_contradicts_wrong_answers_only() -> None:
    """After learning a few facts by heart the probe tells right answers from wrong ones."""
    torch.set_num_threads(1)
    model, processor = tiny_model()
    facts = {1: "red", 2: "blue", 3: "green", 4: "purple"}
    right = probe.encode(processor, [fact(number, answer) for number, answer in facts.items()])
    wrong = probe.encode(processor, [fact(number, "seven") for number in facts])
    for seed in range(60):
        model = probe.tune(model, right, lr=3e-3, batch_tokens=4096, seed=seed)
    against, answers = probe.contradictions(model, right)
    assert (against.sum(), answers.sum()) == (0, 4)
    against, answers = probe.contradictions(model, wrong)
    assert (against.sum(), answers.sum()) == (4, 4)
    believed = probe.answer_probabilities(model, right)
    assert believed.min() > probe.answer_probabilities(model, wrong).max()


def test_packing_changes_no_probability() -> None:
    torch.set_num_threads(1)
    model, processor = tiny_model()
    encoded = probe.encode(processor, pool(3))
    together = probe.answer_probabilities(model, encoded)
    alone = [probe.answer_probabilities(model, [item])[0] for item in encoded]
    assert together == pytest.approx(alone, abs=1e-6)


def test_phrases_are_embedded_apart() -> None:
    torch.set_num_threads(1)
    model, processor = tiny_model()
    phrases = ["a red circle", "how many objects are there", "a red circle"]
    table = probe.embed_phrases(model, processor, phrases)
    assert table.shape == (3, model.config.text_config.hidden_size)
    np.testing.assert_allclose(table[0], table[2], atol=1e-5)
    single = probe.embed_phrases(model, processor, phrases[1:2])
    np.testing.assert_allclose(table[1], single[0], atol=1e-5)


class Planted:
    """A validator with known figures: what validate() decides, apart from measuring."""

    def __init__(self, quality: dict[str, float], gains: dict[str, tuple[float, float]]) -> None:
        self.train = dict.fromkeys(quality)
        self._quality, self._gains = quality, gains
        self.asked: list[tuple[tuple[str, ...], str]] = []

    def quality(self, source: str) -> float:
        return self._quality[source]

    def gain(self, accepted: list[str], candidate: str) -> tuple[float, float]:
        self.asked.append((tuple(accepted), candidate))
        return self._gains[candidate]


def test_sources_join_one_by_one_and_must_help_or_hold() -> None:
    limits = {"min_quality": 0.8, "min_gain": 0.0}
    recipe = micro_recipe().curation.instruction2.model_copy(update=limits)
    planted = Planted(
        {"best": 1.0, "helps": 0.95, "hurts": 0.9, "holds": 0.85, "wrong": 0.4},
        {"helps": (0.02, 0.01), "hurts": (-0.03, 0.01), "holds": (-0.005, 0.01)},
    )
    reports = {name: instruction.SourceReport(10) for name in planted.train}
    accepted = instruction.validate(planted, reports, recipe)  # type: ignore[arg-type]
    assert accepted == ["best", "helps", "holds"]
    assert reports["wrong"].verdict == "refused: quality"
    assert reports["hurts"].verdict == "refused: no gain"
    assert planted.asked[-1] == (("best", "helps"), "holds")


def test_no_source_at_all_is_an_error() -> None:
    planted = Planted({"wrong": 0.1}, {})
    reports = {"wrong": instruction.SourceReport(10)}
    with pytest.raises(instruction.NoSource, match="min_quality"):
        instruction.validate(planted, reports, micro_recipe().curation.instruction2)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_stage_on_raw_sources(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    # An untaught captioner measures noise, so no source is refused for its gain here.
    recipe = micro_recipe(
        "curation.instruction2.target_size=40", "curation.instruction2.min_gain=-1.0"
    )
    inputs = {
        "instruction": write(tmp_path / "raw", raw(100)),
        "captioner": save_tiny(tmp_path / "captioner"),
    }
    ctx = local_context(tmp_path / "a", recipe, "curation.instruction2", inputs)
    instruction.run(ctx)
    reader = SampleReader(ctx.output("instruction"))
    figures = ctx.summary_values
    assert len(reader) == figures["kept"] == 40
    assert figures["evenness_after"] > figures["evenness_before"]
    assert figures["buckets"] > figures["categories"]
    assert all({"phrase", "bucket"} <= sample.meta.keys() for sample in reader)
