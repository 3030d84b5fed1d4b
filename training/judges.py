"""Stage curation.judges: fine-tune the captioner into caption judges and measure them.

Per dimension (ITA, VIR) there is a Score judge that answers 1-5 and a Yes-or-No judge, as in
paper Table 2; here all four share one set of weights and differ by their prompt. Training items
are drawn evenly over the teacher's scores (paper section 3.1.1). Yes means a score of at least 3
(spec A10).

Precision and recall are measured on scored captions whose images training never saw. The paper
names neither its positive class nor its test distribution: ours are "keep" (score >= 3) and every
score weighted alike, so that a judge that always says yes has a precision of 0.6. The figures of
the other class, "drop", are reported beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.choices import Question, choice_probabilities
from model.checkpoint import load_model, save_model
from sailyard.media import decode_image
from sailyard.samples import Sample, SampleReader, write_samples
from training.supervised import SupervisedRun
from training.world import join_world

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor
    from sailyard.recipe.data import JudgesRecipe
    from sailyard.stage import StageContext

JUDGES_FILE = "judges.json"
KEEP_FROM = 3
SCORES = ("1", "2", "3", "4", "5")
YES, NO = "yes", "no"

# Short on purpose: a small tokenizer spells rare words letter by letter.
JUDGES: dict[str, dict[str, Any]] = {
    "ita_score": {
        "prompt": "Caption: {caption}\nDoes the caption match the image? Score 1 to 5.",
        "answers": list(SCORES),
    },
    "ita_yorn": {
        "prompt": "Caption: {caption}\nDoes the caption match the image? yes or no.",
        "answers": [YES, NO],
    },
    "vir_score": {
        "prompt": "Caption: {caption}\nHow much does the image show? Score 1 to 5.",
        "answers": list(SCORES),
    },
    "vir_yorn": {
        "prompt": "Caption: {caption}\nDoes the image show enough? yes or no.",
        "answers": [YES, NO],
    },
}


class JudgesTooWeak(ValueError):
    """A judge missed the recipe's precision or recall."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well one judge separates captions to keep from captions to drop."""

    precision: float  # of those it keeps, how many deserve it
    recall: float  # of those that deserve it, how many it keeps
    drop_precision: float
    drop_recall: float
    exact: float | None  # Score judges: share of exactly right scores
    items: int

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-able."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "drop_precision": self.drop_precision,
            "drop_recall": self.drop_recall,
            "exact": self.exact,
            "items": self.items,
        }


def right_answer(name: str, scores: Mapping[str, Any]) -> str:
    """The answer that a judge should give to a caption with these teacher scores."""
    score = int(scores[name.split("_")[0]])
    if name.endswith("_score"):
        return str(score)
    return YES if score >= KEEP_FROM else NO


def ask(name: str, sample: Sample) -> list[dict[str, str]]:
    """The user turn that puts a scored caption before a judge."""
    caption = next(m["content"] for m in sample.messages if m["role"] == "assistant")
    text = JUDGES[name]["prompt"].replace("{caption}", caption)
    return [{"role": "user", "content": "<image>\n" * len(sample.images) + text}]


def split(samples: SampleReader, heldout_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions to train on and to measure on; one image is never on both sides."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position in range(len(samples)):
        key = hashlib.sha256(b"".join(samples[position].images)).digest()
        groups[key].append(position)
    ordered = list(groups.values())
    order = np.random.default_rng([seed, 1]).permutation(len(ordered))
    wanted = max(round(heldout_fraction * len(samples)), 1)
    heldout: list[int] = []
    train: list[int] = []
    for index in order:
        (heldout if len(heldout) < wanted else train).extend(ordered[int(index)])
    if not train:
        raise ValueError(
            f"{len(samples)} scored captions leave none to train on at heldout_fraction "
            f"{heldout_fraction}: raise curation.caption_scores.num_scored"
        )
    return sorted(train), sorted(heldout)


def draw_evenly(scores: Mapping[int, int], total: int, rng: np.random.Generator) -> list[int]:
    """`total` positions, every score equally often; rare scores are drawn repeatedly.

    Args:
        scores: position -> score.
    """
    by_score: dict[int, list[int]] = defaultdict(list)
    for position, score in scores.items():
        by_score[score].append(position)
    share = -(-total // len(by_score))
    drawn: list[int] = []
    for _, positions in sorted(by_score.items()):
        rounds = -(-share // len(positions))
        pool = np.concatenate([rng.permutation(positions) for _ in range(rounds)])
        drawn += pool[:share].tolist()
    return [drawn[int(i)] for i in rng.permutation(len(drawn))[:total]]


def training_samples(
    reader: SampleReader, positions: Sequence[int], totals: Mapping[str, int], seed: int
) -> Iterator[Sample]:
    """Judge items: for each dimension its total of captions, each put to both of its judges."""
    for index, (dimension, num_train) in enumerate(totals.items()):
        rng = np.random.default_rng([seed, 2, index])
        scores = {position: int(reader[position].meta[dimension]) for position in positions}
        for number, position in enumerate(draw_evenly(scores, num_train, rng)):
            sample = reader[position]
            for name in (f"{dimension}_score", f"{dimension}_yorn"):
                answer = {"role": "assistant", "content": right_answer(name, sample.meta)}
                yield Sample(
                    id=f"{name}-{number:07d}",
                    source=name,
                    task="judge",
                    messages=[*ask(name, sample), answer],
                    images=sample.images,
                    meta={"caption_id": sample.id},
                )


def measure(answers: Sequence[str], truths: Sequence[str], scores: Sequence[int]) -> Quality:
    """Quality of one judge, every teacher score weighted alike.

    Args:
        answers, truths: what the judge said and should have said ("4" or "yes").
        scores: the teacher's scores, whose classes get equal weight.
    """
    classes, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    weights = 1.0 / (len(classes) * counts[inverse])
    kept = np.array([_keeps(answer) for answer in answers])
    good = np.array([_keeps(truth) for truth in truths])

    def share(part: np.ndarray, whole: np.ndarray) -> float:
        total = float(weights[whole].sum())
        return float(weights[part & whole].sum()) / total if total else 0.0

    is_score = truths[0] in SCORES
    exact = np.array([a == t for a, t in zip(answers, truths, strict=True)])
    return Quality(
        precision=share(good, kept),
        recall=share(kept, good),
        drop_precision=share(~good, ~kept),
        drop_recall=share(~kept, ~good),
        exact=float(weights[exact].sum()) if is_score else None,
        items=len(scores),
    )


def _keeps(answer: str) -> bool:
    return answer == YES or (answer in SCORES and int(answer) >= KEEP_FROM)


def measure_judges(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    samples: Sequence[Sample],
) -> dict[str, Quality]:
    """Quality of all four judges on scored captions they were not trained on."""
    pictures: list[list[Image.Image]] = [
        [decode_image(data) for data in sample.images] for sample in samples
    ]
    questions = [
        [Question(ask(name, sample), tuple(judge["answers"])) for name, judge in JUDGES.items()]
        for sample in samples
    ]
    tables = choice_probabilities(model, processor, pictures, questions)
    found = {}
    for (name, judge), table in zip(JUDGES.items(), tables, strict=True):
        answers = [judge["answers"][int(i)] for i in table.argmax(axis=1)]
        truths = [right_answer(name, sample.meta) for sample in samples]
        dimension = name.split("_")[0]
        found[name] = measure(answers, truths, [int(s.meta[dimension]) for s in samples])
    return found


def check_quality(qualities: Mapping[str, Quality], recipe: JudgesRecipe) -> None:
    """Raise JudgesTooWeak unless every judge reaches the recipe's precision and recall."""
    weak = [
        f"{name} (precision {quality.precision:.3f}, recall {quality.recall:.3f})"
        for name, quality in qualities.items()
        if quality.precision < recipe.min_precision or quality.recall < recipe.min_recall
    ]
    if weak:
        raise JudgesTooWeak(
            f"below precision {recipe.min_precision} or recall {recipe.min_recall}: "
            f"{'; '.join(weak)}. Train longer (curation.judges.max_steps), score more captions "
            "(curation.caption_scores.num_scored) or lower curation.judges.min_precision and "
            "min_recall"
        )


def run(ctx: StageContext) -> None:
    """The stage: scored captions and the captioner in, judges out."""
    recipe: JudgesRecipe = ctx.section("curation.judges")
    reader = SampleReader(ctx.input("scores"))
    train, heldout = split(reader, recipe.heldout_fraction, ctx.seed)
    data = ctx.scratch() / "judge-items"
    shutil.rmtree(data, ignore_errors=True)  # a killed run may have left half of them
    totals = {"ita": recipe.num_train, "vir": math.ceil(recipe.num_train * recipe.vir_fraction)}
    write_samples(data, training_samples(reader, train, totals, ctx.seed))
    model, processor = load_model(ctx.input("captioner"))
    model.to(join_world().device)
    before = measure_judges(model, processor, [reader[p] for p in heldout])
    model.to("cpu")  # ranks that share it need not hold all of it
    training = SupervisedRun(ctx, model, processor, recipe, {"judges": data})
    figures = training.run()
    model = training.model.to(training.world.device)
    qualities = measure_judges(model, processor, [reader[p] for p in heldout])
    ctx.summary(
        **figures,
        judges={name: quality.as_dict() for name, quality in qualities.items()},
        zero_shot={name: quality.as_dict() for name, quality in before.items()},
        scored_train=len(train),
        scored_heldout=len(heldout),
    )
    check_quality(qualities, recipe)
    _save(ctx.output("judges"), model, processor, qualities)


def _save(
    directory: Path,
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    qualities: Mapping[str, Quality],
) -> None:
    save_model(directory, model, processor)
    described = {
        "judges": JUDGES,
        "keep_from": KEEP_FROM,
        "quality": {name: quality.as_dict() for name, quality in qualities.items()},
    }
    text = json.dumps(described, indent=2, sort_keys=True)
    (directory / JUDGES_FILE).write_text(text + "\n", encoding="utf-8")
