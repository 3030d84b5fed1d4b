"""Stage curation.video: keep clips whose question is supported, rich and hard enough.

Three scores per clip (paper section 4.1.1): alignment of question and frames (-1 to 10), content
richness (-1 to 7), difficulty (-1 to 8); -1 is a refusal. The small world's oracle scores clips
whose truth is known; a user's clips, which it cannot know, pass unscored and are counted so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from curation.frames import even_indices
from curation.oracle import REFUSED, VideoScore, score_video
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import VideoFilter
    from sailyard.stage import StageContext

_FRAME = re.compile(r"Frame-\d+: <image>\n")


def verdict(score: VideoScore | None, recipe: VideoFilter) -> str:
    """ "kept", "unscored", or the first reason to drop a clip."""
    if score is None:
        return "unscored"
    if REFUSED in (score.alignment, score.richness, score.difficulty):
        return "refused"
    if score.alignment < recipe.min_alignment:
        return "alignment"
    if score.richness < recipe.min_richness:
        return "richness"
    if score.difficulty < recipe.min_difficulty:
        return "difficulty"
    return "kept"


def thin(sample: Sample, num_frames: int) -> Sample:
    """The clip with at most `num_frames` frames, evenly spaced, its placeholders renumbered."""
    if len(sample.images) <= num_frames:
        return sample
    sample.images = [sample.images[i] for i in even_indices(len(sample.images), num_frames)]
    frames = "".join(f"Frame-{i + 1}: <image>\n" for i in range(num_frames))
    first = sample.messages[0]
    first["content"] = frames + _FRAME.sub("", first["content"])
    return sample


def run(ctx: StageContext) -> None:
    """The stage: raw clips in, filtered clips out, with the funnel by reason."""
    recipe = ctx.section("curation.video")
    raw = SampleReader(ctx.input("video"))
    funnel: Counter[str] = Counter()
    faults: dict[str, Counter[str]] = {"kept": Counter(), "dropped": Counter()}

    def kept() -> Iterator[Sample]:
        for index in range(len(raw)):
            sample = raw[index]
            score = score_video(sample)
            fate = verdict(score, recipe)
            funnel[fate] += 1
            stays = fate in ("kept", "unscored")
            faults["kept" if stays else "dropped"][sample.meta.get("fault", "unknown")] += 1
            ctx.progress(index + 1, len(raw), fate)
            if not stays:
                continue
            if score is not None:
                sample.meta |= {
                    "alignment": score.alignment,
                    "richness": score.richness,
                    "difficulty": score.difficulty,
                }
            yield thin(sample, recipe.num_frames)

    count = write_samples(ctx.output("video"), kept())
    ctx.summary(
        num_raw=len(raw),
        num_kept=count,
        funnel=dict(funnel),
        planted_faults={fate: dict(seen) for fate, seen in faults.items()},
    )
