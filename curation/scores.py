"""Stage curation.caption_scores: a teacher scores captions for VIR and ITA, 1 to 5 each.

VIR is the visual information richness of the image, ITA the alignment of image and text (paper
section 3.1.1). The teacher is a strong model behind an API, or the oracle of the small world,
which knows what is in the picture. A caption that the teacher will not score is left out and
counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curation.oracle import score_sample
from curation.teacher import ApiTeacher, Declined, Question, Reply, parse_object
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import CaptionScores
    from sailyard.stage import StageContext

MIN_SCORE, MAX_SCORE = 1, 5
# Asked in one go: enough to keep every connection busy, little enough to stop between.
CHUNK = 512

RUBRIC = """Rate this image and its caption on two scales from 1 (poor) to 5 (excellent).

"vir", visual information richness of the image:
- instances and entities: how many, how varied, how distinct;
- visual complexity: colours, composition, texture;
- fine details: small objects, textures, relations to the surroundings.

"ita", alignment of the caption with the image:
- specificity: it names what is there rather than generalities;
- completeness: nothing important is left out;
- accuracy: nothing is invented, nothing is said twice.

Caption: {caption}

Reply with one JSON object and nothing else: {{"vir": <1-5>, "ita": <1-5>}}.
If you cannot rate it, reply {{"vir": -1, "ita": -1}}."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A teacher's verdict on one caption, 1-5 each."""

    vir: int
    ita: int


def caption_of(sample: Sample) -> str:
    """The caption of a caption sample: its first assistant turn.

    Raises:
        ValueError: the sample has none.
    """
    for message in sample.messages:
        if message["role"] == "assistant":
            return message["content"]
    raise ValueError(f"caption sample {sample.id!r} has no assistant turn")


def parse_scores(text: str) -> Scores:
    """Scores from a reply that is exactly the JSON object asked for.

    Raises:
        Declined: the teacher said -1.
        ValueError: other text, other keys, or values outside 1-5.
    """
    values = parse_object(text)
    if set(values) != {"vir", "ita"}:
        raise ValueError(f"expected the keys vir and ita, got {sorted(values)}")
    if -1 in values.values():
        raise Declined(f"the teacher would not rate it: {text}")
    for name, value in values.items():
        if type(value) is not int or not MIN_SCORE <= value <= MAX_SCORE:
            raise ValueError(f"{name} is {value!r}, not a whole number from 1 to 5")
    return Scores(values["vir"], values["ita"])


def oracle_scores(
    samples: Sequence[Sample], on_reply: Callable[[int], None]
) -> list[Reply[Scores]]:
    """Scores computed from the known truth; samples without one are declined."""
    replies: list[Reply[Scores]] = []
    for index, sample in enumerate(samples):
        verdict = score_sample(sample)
        replies.append(
            Reply(None, "no known truth")
            if verdict is None
            else Reply(Scores(vir=verdict.vir, ita=verdict.ita))
        )
        on_reply(index + 1)
    return replies


def api_scores(
    teacher: ApiTeacher, samples: Sequence[Sample], on_reply: Callable[[int], None]
) -> list[Reply[Scores]]:
    """Scores from a model behind an API."""
    questions = [
        Question(RUBRIC.format(caption=caption_of(sample)), tuple(sample.images))
        for sample in samples
    ]
    return teacher.ask_many(questions, parse_scores, on_reply)


def choose(num_captions: int, num_scored: int, seed: int) -> list[int]:
    """Positions of the captions to score: an even draw without replacement, in stored order."""
    rng = np.random.default_rng(seed)
    return sorted(rng.permutation(num_captions)[:num_scored].tolist())


def run(ctx: StageContext) -> None:
    """The stage: captions in, scored captions (meta "vir" and "ita") out."""
    recipe: CaptionScores = ctx.section("curation.caption_scores")
    reader = SampleReader(ctx.input("captions"))
    chosen = choose(len(reader), recipe.num_scored, ctx.seed)
    score = _scorer(recipe)
    refusals: Counter[str] = Counter()
    histogram = {"vir": Counter[int](), "ita": Counter[int]()}

    def scored() -> Iterator[Sample]:
        for start in range(0, len(chosen), CHUNK):
            samples = [reader[position] for position in chosen[start : start + CHUNK]]
            done = start

            def report(settled: int, done: int = done) -> None:
                ctx.progress(done + settled, len(chosen), recipe.teacher)

            for sample, reply in zip(samples, score(samples, report), strict=True):
                if reply.value is None:
                    refusals[reply.reason] += 1
                    continue
                sample.meta |= {"vir": reply.value.vir, "ita": reply.value.ita}
                histogram["vir"][reply.value.vir] += 1
                histogram["ita"][reply.value.ita] += 1
                yield sample

    count = write_samples(ctx.output("scores"), scored())
    if count == 0:
        raise ValueError(f"the {recipe.teacher} teacher scored none of {len(chosen)} captions")
    ctx.summary(
        teacher=recipe.teacher,
        asked=len(chosen),
        scored=count,
        refused=dict(refusals),
        histogram={
            name: {str(score): counts[score] for score in range(MIN_SCORE, MAX_SCORE + 1)}
            for name, counts in histogram.items()
        },
        share_below_3={
            name: sum(counts[score] for score in (1, 2)) / count
            for name, counts in histogram.items()
        },
    )


def _scorer(
    recipe: CaptionScores,
) -> Callable[[Sequence[Sample], Callable[[int], None]], list[Reply[Scores]]]:
    if recipe.teacher == "oracle":
        return oracle_scores
    teacher = ApiTeacher(recipe.api_base, recipe.api_model, recipe.concurrency)
    return lambda samples, on_reply: api_scores(teacher, samples, on_reply)
