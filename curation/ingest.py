"""Stage curation.ingest: the small world's raw data and the user's own, what is broken set aside.

`scan` reads anything a user has (see `curation.userdata`) and yields a sample or a rejection for
every item: nothing is lost silently and nothing stops the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curation.broken import write_broken
from curation.userdata.folder import Folder
from curation.userdata.records import Record, Rejected, printable, to_sample
from curation.world.build import reference_samples
from curation.world.sources import prompt_pool, raw_captions, raw_clips, raw_instructions
from sailyard.samples import Sample, SampleReader, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import DataRecipe, WorldRecipe
    from sailyard.stage import StageContext

__all__ = ["DataNotFound", "Rejected", "run", "scan"]

# Frames taken of a user's video; curation.video thins them further. The paper's evaluation: 16.
NUM_FRAMES = 16
REJECTED_FILE = "rejected.jsonl"
COUNTS_FILE = "counts.json"


class DataNotFound(ValueError):
    """The user's data path does not exist."""


def source_name(path: Path) -> str:
    """ "user:<name>" of a path, with plain characters only."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.resolve().name.split(".")[0]).strip("-")
    return f"user:{plain or 'data'}"


def scan(path: Path | str, num_frames: int = NUM_FRAMES) -> Iterator[Sample | Rejected]:
    """Every item under a file or folder, as a sample or as a rejection with its reason.

    Understood: images and short videos with sidecar .txt/.caption/.json, JSON Lines and CSV that
    name media, WebDataset tars, Parquet, Hugging Face data sets saved to disk; mixed as they come.

    Raises:
        DataNotFound: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise DataNotFound(f"{path} does not exist: give a folder or a file to take in")
    source = source_name(path)
    # Sixteen bytes an id: millions of items fit in memory.
    seen: set[bytes] = set()
    for found in Folder(path).scan():
        result = to_sample(found, source, num_frames) if isinstance(found, Record) else found
        if isinstance(result, Rejected):
            yield Rejected(printable(result.name), result.reason, printable(result.detail))
            continue
        digest = hashlib.sha256(result.id.encode()).digest()[:16]
        if digest in seen:
            name = result.meta["origin"]
            yield Rejected(name, "duplicate_id", f"the id {name!r} came before; the first stays")
            continue
        seen.add(digest)
        yield result


class Quarantine:
    """Rejections on disk, one JSON object a line, and their counts by reason."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / REJECTED_FILE).open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()

    def add(self, origin: str, item: Rejected) -> None:
        """Write one rejection down; `origin` is the data it came from."""
        self.counts[item.reason] += 1
        line = {"origin": origin, "name": item.name, "reason": item.reason, "detail": item.detail}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the file and write the counts beside it."""
        self._file.close()
        text = json.dumps(dict(sorted(self.counts.items())), indent=1)
        (self._directory / COUNTS_FILE).write_text(text + "\n", encoding="utf-8")


def take_in(path: Path, origin: str, quarantine: Quarantine) -> Iterator[Sample]:
    """The good samples under a path; the rest goes to quarantine."""
    for item in scan(path):
        if isinstance(item, Rejected):
            quarantine.add(origin, item)
        else:
            yield item


def user_kind(sample: Sample) -> str:
    """The output a user's sample belongs to: "video", "captions" or "instruction"."""
    if sample.is_video:
        return "video"
    return "captions" if sample.task == "caption" else "instruction"


def run(ctx: StageContext) -> None:
    """The stage: recipe in; captions, reference, video, instruction, rl_pool, quarantine out."""
    world: WorldRecipe = ctx.section("world")
    data: DataRecipe = ctx.section("data")
    quarantine = Quarantine(ctx.output("quarantine"))
    user = _user_samples(ctx, data, quarantine)
    num_leaked = _broken_samples(ctx, world, quarantine)
    outputs = _world_streams(ctx, world)
    totals = {
        "captions": world.num_images + world.num_digits + world.num_words + world.num_photos,
        "reference": 2 * world.num_reference,
        "video": world.num_videos,
        "instruction": world.num_instructions,
        "rl_pool": world.num_rl_prompts,
    }
    sizes: dict[str, int] = {}
    for name, stream in outputs.items():
        mine: Sequence[Sample] = user.get(name, ())
        both = _watched(ctx, name, stream, mine, totals[name] + len(mine))
        sizes[name] = write_samples(ctx.output(name), both)
    quarantine.close()
    ctx.summary(
        num_samples=sizes,
        num_user={name: len(reader) for name, reader in user.items()},
        quarantine=dict(quarantine.counts),
        num_quarantined=quarantine.counts.total(),
        num_broken_made=world.num_broken,
        num_broken_missed=num_leaked,
    )


def _world_streams(ctx: StageContext, world: WorldRecipe) -> dict[str, Iterator[Sample]]:
    """One generator per output, so that the size of one does not change another."""
    size = ctx.section("model.vision").image_size
    rngs = [np.random.default_rng([ctx.seed, i]) for i in range(5)]
    counts = {
        "microworld": world.num_images,
        "digits": world.num_digits,
        "words": world.num_words,
        "photos": world.num_photos,
    }
    noise = world.noisy_instruction_rate
    return {
        "captions": raw_captions(counts, rngs[0], size, world.bad_caption_rate),
        "reference": reference_samples(world.num_reference, rngs[1], size),
        "video": raw_clips(world.num_videos, rngs[2], size),
        "instruction": raw_instructions(world.num_instructions, rngs[3], size, noise),
        "rl_pool": prompt_pool(world.num_rl_prompts, rngs[4], size),
    }


def _user_samples(
    ctx: StageContext, data: DataRecipe, quarantine: Quarantine
) -> dict[str, SampleReader]:
    """The user's samples by the output they belong to, kept in scratch shards meanwhile."""
    if data.path is None:
        return {}
    path = Path(data.path)
    readers = {}
    # One pass per output: a stream of mixed kinds cannot feed three writers without memory.
    whole = ctx.scratch() / "user"
    write_samples(whole, take_in(path, path.name, quarantine))
    reader = SampleReader(whole)
    for kind in ("captions", "video", "instruction"):
        folder = ctx.scratch() / f"user-{kind}"
        members = (reader[i] for i in range(len(reader)))
        if write_samples(folder, (s for s in members if user_kind(s) == kind)):
            readers[kind] = SampleReader(folder)
    return readers


def _broken_samples(ctx: StageContext, world: WorldRecipe, quarantine: Quarantine) -> int:
    """Make the broken files, take them in, and count what slipped through (none should)."""
    if not world.num_broken:
        return 0
    folder = ctx.scratch() / "broken"
    write_broken(folder, world.num_broken)
    return sum(1 for _ in take_in(folder, "broken on purpose", quarantine))


def _watched(
    ctx: StageContext, name: str, stream: Iterator[Sample], user: Sequence[Sample], total: int
) -> Iterator[Sample]:
    """The world's samples, then the user's, with progress."""
    for done, sample in enumerate(chain(stream, iter(user)), 1):
        ctx.progress(done, total, name)
        yield sample
