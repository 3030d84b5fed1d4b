"""Stage curation.instruction2: from raw instruction sources to an even, clean set.

Paper section 4.1.2, with the captioner (the predecessor model) as its measuring instrument:

1. quality: a source is refused when the captioner contradicts too many of its answers; exact
   repetitions are dropped;
2. incremental validation: sources join one by one, best first. The captioner is tuned on what has
   been accepted, with and without the candidate, and answers held-back items of the accepted
   sources; the candidate must help or hold (within one standard error of the paired difference);
3. latent classes: a descriptive phrase per sample (the captioner's caption and the question) is
   embedded by the captioner's language model and sorted into about ten times as many buckets as
   there are sources, which are then drawn evenly;
4. re-annotation: answers are written anew by the teacher. Here that is the known truth; samples
   without one keep their answers and are counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curation import probe
from curation.buckets import draw_evenly, evenness, kmeans
from model.checkpoint import load_model
from model.device import own_device
from model.generation import Prompt, generate
from sailyard.media import decode_image
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import SailVLProcessor
    from sailyard.recipe.data import Instruction2
    from sailyard.stage import StageContext

# The probes are short; their rate is that of fine-tuning a small model, our choice.
PROBE_LR = 1e-3
PROBE_TOKENS = 2048
HELDBACK_SHARE = 0.25
PHRASE_TOKENS = 24
PHRASE_BATCH = 128
_IMAGES = re.compile(r"(Frame-\d+: )?<image>\n")


class NoSource(ValueError):
    """Every instruction source was refused."""


@dataclass(slots=True)
class SourceReport:
    """What the validation found about one source."""

    samples: int
    duplicates: int = 0
    quality: float = 0.0  # share of probed answers that the captioner does not contradict
    gain: float | None = None  # rise of the probe's score when it is added; None for the first
    error: float | None = None  # standard error of the gain
    verdict: str = "accepted"


def fingerprint(sample: Sample) -> bytes:
    """Equal for samples with the same images and the same words."""
    digest = hashlib.sha256(json.dumps(sample.messages).encode())
    for image in sample.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.digest()


def group(reader: SampleReader) -> tuple[dict[str, list[int]], dict[str, SourceReport]]:
    """Positions per source without repetitions, and the counts."""
    positions: dict[str, list[int]] = defaultdict(list)
    reports: dict[str, SourceReport] = {}
    seen: set[bytes] = set()
    for position in range(len(reader)):
        sample = reader[position]
        report = reports.setdefault(sample.source, SourceReport(0))
        report.samples += 1
        key = fingerprint(sample)
        if key in seen:
            report.duplicates += 1
            continue
        seen.add(key)
        positions[sample.source].append(position)
    return dict(positions), reports


class Validator:
    """Stages 1 and 2: measures sources with a captioner on subsets of a fixed size."""

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        reader: SampleReader,
        positions: Mapping[str, Sequence[int]],
        recipe: Instruction2,
        seed: int,
    ) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        # Two halves that never mix: items to tune on and items to answer.
        self.train: dict[str, list[Any]] = {}
        self.heldback: dict[str, list[Any]] = {}
        # Every source is probed on as many items as the smallest share allows for.
        share = max(recipe.probe_size // max(len(positions), 1), 2)
        for index, (source, own) in enumerate(sorted(positions.items())):
            order = np.random.default_rng([seed, index]).permutation(len(own))[:share]
            encoded = probe.encode(processor, [reader[own[int(i)]] for i in order])
            cut = max(math.ceil(len(encoded) * HELDBACK_SHARE), 1)
            self.heldback[source], self.train[source] = encoded[:cut], encoded[cut:]

    def quality(self, source: str) -> float:
        """Share of a source's probed answers that the captioner does not contradict."""
        encoded = [*self.heldback[source], *self.train[source]]
        against, answers = probe.contradictions(self.model, encoded)
        return 1.0 - float(against.sum()) / max(int(answers.sum()), 1)

    def scores(self, sources: Sequence[str], asked: Sequence[str]) -> np.ndarray:
        """Answer probability on the held-back items of `asked` after tuning on `sources`."""
        train = [item for source in sources for item in self.train[source]]
        tuned = (
            probe.tune(self.model, train, lr=PROBE_LR, batch_tokens=PROBE_TOKENS, seed=self.seed)
            if train
            else self.model
        )
        items = [item for source in asked for item in self.heldback[source]]
        return probe.answer_probabilities(tuned, items)

    def gain(self, accepted: Sequence[str], candidate: str) -> tuple[float, float]:
        """Rise of the probe's score when the candidate joins, and its standard error."""
        before = self.scores(accepted, accepted)
        after = self.scores([*accepted, candidate], accepted)
        difference = after - before
        error = (
            float(difference.std(ddof=1) / math.sqrt(len(difference)))
            if len(difference) > 1
            else 0.0
        )
        return float(difference.mean()), error


def validate(
    validator: Validator, reports: dict[str, SourceReport], recipe: Instruction2
) -> list[str]:
    """Accepted sources, best quality first; the reports are filled in.

    Raises:
        NoSource: none passes the quality bar.
    """
    for source in validator.train:
        report = reports[source]
        report.quality = validator.quality(source)
        if report.quality < recipe.min_quality:
            report.verdict = "refused: quality"
    passed = [s for s in validator.train if reports[s].verdict == "accepted"]
    if not passed:
        worst = {source: round(report.quality, 2) for source, report in reports.items()}
        raise NoSource(
            f"no instruction source reaches curation.instruction2.min_quality "
            f"{recipe.min_quality}: {worst}. Lower it, or train the captioner longer"
        )
    passed.sort(key=lambda source: (-reports[source].quality, source))
    accepted = passed[:1]
    for candidate in passed[1:]:
        report = reports[candidate]
        report.gain, report.error = validator.gain(accepted, candidate)
        if report.gain + report.error < recipe.min_gain:
            report.verdict = "refused: no gain"
        else:
            accepted.append(candidate)
    return accepted


def describe(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    samples: Sequence[Sample],
) -> list[str]:
    """A descriptive phrase per sample: the captioner's caption of it, and what is asked."""
    shown = {i: s for i, s in enumerate(samples) if s.images}
    conversations = []
    for sample in shown.values():
        frames = "".join(f"Frame-{i + 1}: <image>\n" for i in range(len(sample.images)))
        prompt = (
            f"{frames}Describe the video."
            if sample.is_video
            else "<image>\n" * len(sample.images) + "Describe the image."
        )
        images = [decode_image(data) for data in sample.images]
        conversations.append(Prompt([{"role": "user", "content": prompt}], images, sample.is_video))
    completions = generate(
        model,
        processor,
        conversations,
        max_new_tokens=PHRASE_TOKENS,
        batch_size=PHRASE_BATCH,
    )
    captions = {i: group[0].text for i, group in zip(shown, completions, strict=True)}
    phrases = []
    for index, sample in enumerate(samples):
        asked = next((m["content"] for m in sample.messages if m["role"] == "user"), "")
        question = _IMAGES.sub("", asked).split("\n")[0]
        phrases.append(" ".join(filter(None, (question, captions.get(index, "")))))
    return phrases


def reannotate(sample: Sample) -> str:
    """Write the answers anew from the known truth: "corrected", "confirmed" or "unknown"."""
    meta = sample.meta
    if "questions" in meta:
        truths = [str(question["answer"]) for question in meta["questions"]]
    elif "answer" in meta:
        truths = [str(meta["answer"])]
    else:
        return "unknown"
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if len(answers) != len(truths) or meta.get("think"):
        return "unknown"
    changed = False
    for message, truth in zip(answers, truths, strict=True):
        changed |= message["content"] != truth
        message["content"] = truth
    return "corrected" if changed else "confirmed"


def run(ctx: StageContext) -> None:
    """The stage: raw instructions and the captioner in, the curated set out."""
    recipe: Instruction2 = ctx.section("curation.instruction2")
    torch.manual_seed(ctx.seed)
    model, processor = load_model(ctx.input("captioner"))
    model.to(own_device())
    reader = SampleReader(ctx.input("instruction"))
    positions, reports = group(reader)
    ctx.progress(1, 5, "validating sources")
    validator = Validator(model, processor, reader, positions, recipe, ctx.seed)
    accepted = validate(validator, reports, recipe)
    pool = sorted(position for source in accepted for position in positions[source])
    ctx.progress(2, 5, f"describing {len(pool)} samples")
    phrases = describe(model, processor, [reader[position] for position in pool])
    ctx.progress(3, 5, "latent classes")
    embeddings = probe.embed_phrases(model, processor, phrases)
    labels = kmeans(embeddings, recipe.bucket_factor * len(accepted), ctx.seed)
    num_buckets = len(set(labels.tolist()))
    drawn = draw_evenly(labels.tolist(), recipe.target_size, ctx.seed)
    ctx.progress(4, 5, "re-annotating")
    annotation: Counter[str] = Counter()
    chosen_sources: Counter[str] = Counter()

    def curated() -> Iterator[Sample]:
        for index in drawn:
            sample = reader[pool[index]]
            annotation[reannotate(sample)] += 1
            chosen_sources[sample.source] += 1
            sample.meta |= {"phrase": phrases[index], "bucket": int(labels[index])}
            yield sample

    count = write_samples(ctx.output("instruction"), curated())
    ctx.progress(5, 5, f"{count} samples")
    ctx.summary(
        raw=len(reader),
        accepted_sources=accepted,
        sources={name: asdict(report) for name, report in sorted(reports.items())},
        pool=len(pool),
        categories=len(accepted),
        buckets=num_buckets,
        evenness_before=evenness(labels.tolist(), num_buckets),
        evenness_after=evenness([int(labels[index]) for index in drawn], num_buckets),
        kept=count,
        kept_by_source=dict(sorted(chosen_sources.items())),
        annotation=dict(annotation),
    )
