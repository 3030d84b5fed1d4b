"""Stage curation.caption2: the judges read every caption; the weak ones are dropped.

A caption goes when any judge gives it less than the least score or says "No" (paper section
3.1.1; that both dimensions count is our reading, spec A9). Nothing is lost: what is dropped is
an output of its own, each item with its reasons.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from curation.judging import Judges, Verdict
from curation.scores import caption_of
from curation.spread import Batch, Batches, Input, spread
from sailyard.media import decode_image
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.stage import StageContext


class Funnel:
    """Counts what stays and what goes, and why."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped = 0
        self.reasons: Counter[str] = Counter()
        self.qualities: dict[str, Counter[str]] = defaultdict(Counter)
        self.sources: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, sample: Sample, reasons: list[str]) -> None:
        """Count one judged caption; it may have several reasons to go."""
        fate = "dropped" if reasons else "kept"
        self.kept += not reasons
        self.dropped += bool(reasons)
        self.reasons.update(reasons)
        self.sources[sample.source][fate] += 1
        if "quality" in sample.meta:
            self.qualities[str(sample.meta["quality"])][fate] += 1

    def summary(self) -> dict[str, Any]:
        """JSON-able; `by_quality` compares with how the small world spoilt its captions."""
        return {
            "judged": self.kept + self.dropped,
            "kept": self.kept,
            "dropped": self.dropped,
            "reasons": dict(sorted(self.reasons.items())),
            "by_source": _plain(self.sources),
            "by_quality": _plain(self.qualities),
        }


def _plain(table: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {
        name: {"kept": counts["kept"], "dropped": counts["dropped"]}
        for name, counts in sorted(table.items())
    }


def annotate(sample: Sample, verdict: Verdict, reasons: list[str]) -> Sample:
    """The sample with the judges' verdict in its meta."""
    sample.meta["judged"] = {
        "ita": verdict.ita,
        "vir": verdict.vir,
        "ita_yes": verdict.ita_yes,
        "vir_yes": verdict.vir_yes,
    }
    if reasons:
        sample.meta["dropped_because"] = reasons
    return sample


class Judging:
    """Reads batches of captions with one copy of the judges."""

    def __init__(self, judges: Input) -> None:
        self.judges = Judges.load(judges.folder())

    def __call__(self, batch: Batch) -> tuple[Batch, list[Verdict]]:
        """A verdict for each sample of the batch."""
        images = [[decode_image(data) for data in sample.images] for sample in batch.samples]
        captions = [caption_of(sample) for sample in batch.samples]
        return batch, self.judges.verdicts(images, captions, batch_size=len(captions))


def run(ctx: StageContext) -> None:
    """The stage: raw captions and judges in; kept and dropped captions out."""
    recipe = ctx.section("curation.caption2")
    reader = SampleReader(ctx.input("captions"))
    batches = Batches(reader, range(len(reader)), recipe.batch_size)
    funnel = Funnel()
    dropped: list[int] = []
    verdicts: dict[int, Verdict] = {}

    def kept() -> Iterator[Sample]:
        for batch, found in spread(batches, partial(Judging, Input.of(ctx, "judges"))):
            for position, sample, verdict in zip(
                batch.positions, batch.samples, found, strict=True
            ):
                reasons = verdict.reasons(recipe.min_score, recipe.drop_on_no)
                funnel.add(sample, reasons)
                if reasons:
                    dropped.append(position)
                    verdicts[position] = verdict
                else:
                    yield annotate(sample, verdict, [])
            ctx.progress(batch.positions[-1] + 1, len(reader), f"{funnel.dropped} dropped")

    write_samples(ctx.output("captions"), kept())
    # The dropped ones are read again: their positions fit in memory, their images need not.
    write_samples(
        ctx.output("dropped"),
        (
            annotate(
                reader[p], verdicts[p], verdicts[p].reasons(recipe.min_score, recipe.drop_on_no)
            )
            for p in dropped
        ),
    )
    ctx.summary(**funnel.summary())
