"""Synthetic mixes of sample lengths, for packing and balance: what a batch may look like.

No public file gives the lengths of SAIL-VL2's training samples, so nothing here was recorded from
real data. The mixes are built from what is known:

- Shares of the multi-task mix follow paper section 3.2.1: half visual understanding (captions, OCR
  pages, charts), half
  instruction (open VQA, questions made from captions, text), with the video share of our choice.
- Image sizes are those of the kinds of source the paper names: 640 x 480 photographs (COCO, the
  images of most VQA sets), web pictures around 700 pixels, letter pages scanned at 200 dots per
  inch (IDL-WDS), charts of 900 x 650. The spreads are our assumption.
- Visual tokens are not assumed: the released tiling rule (at most 10 tiles of 448 pixels and a
  thumbnail, 256 tokens each) or the AnyRes rule (sides in multiples of 28, at most 16,384 patches)
  is applied to every image size, by the code that training uses.
- Text lengths are log-normal around medians of our assumption. The whole is checked against the one
  length that the paper gives away: 64M samples are 128B tokens, 2,000 tokens a sample.

The draw is seeded and the benchmarks print the digest of what they used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.patches import native_grid
from model.tiling import choose_grid

TILE, PATCH, MERGE, MAX_TILES = 448, 14, 2, 10  # of the released model
TILE_PATCHES = (TILE // PATCH) ** 2
NUM_FRAMES = 16  # of a video, one tile each (paper section 6.1)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of sample: its share, its images (width, height, log-spread) and its text.

    `median_text` and `text_spread` are the median (tokens) and the log-deviation of a log-normal.
    """

    name: str
    share: float
    width: int
    height: int
    size_spread: float
    median_text: int
    text_spread: float
    num_images: int = 1


MULTITASK = (
    Kind("web captions", 0.24, 760, 640, 0.35, 180, 0.5),
    Kind("document pages", 0.18, 1700, 2200, 0.10, 700, 0.6),
    Kind("charts", 0.06, 900, 650, 0.20, 300, 0.6),
    Kind("photograph questions", 0.18, 640, 480, 0.15, 250, 0.8),
    Kind("caption questions", 0.15, 760, 640, 0.35, 300, 0.5),
    Kind("text", 0.16, 0, 0, 0.0, 600, 0.9, num_images=0),
    Kind("video", 0.03, TILE, TILE, 0.0, 200, 0.6, num_images=NUM_FRAMES),
)
"""Pretraining and instruction, rows of 8,192."""

INSTRUCTION = (
    Kind("general", 0.361, 640, 480, 0.20, 250, 0.8),
    Kind("charts", 0.090, 850, 600, 0.25, 180, 0.7),
    Kind("screens", 0.061, 540, 960, 0.15, 150, 0.6),
    Kind("document pages", 0.055, 1700, 2200, 0.10, 250, 0.7),
    Kind("mathematics and reasoning", 0.201, 450, 330, 0.25, 220, 0.7),
    Kind("text in pictures", 0.089, 700, 600, 0.35, 130, 0.6),
    Kind("language", 0.143, 0, 0, 0.0, 650, 0.7, num_images=0),
)
"""Instruction tuning, rows of 8,192. The shares, too, are our assumption: picked to look like the
categories of public instruction sets, with no source that was checked."""

LONGCOT = (
    Kind("long chains of thought", 0.7, 640, 480, 0.25, 1800, 0.8),
    Kind("charts with a thought", 0.2, 900, 650, 0.20, 1200, 0.7),
    Kind("text mathematics", 0.1, 0, 0, 0.0, 2600, 0.8, num_images=0),
)
"""LongCoT SFT, rows of 20,480."""


@dataclass(frozen=True, slots=True)
class Length:
    """One sample: whole length in tokens, and the patches of each tile or image."""

    tokens: int
    patches: tuple[int, ...]


def draw(
    kinds: Sequence[Kind], num_samples: int, *, any_resolution: bool, seed: int = 0
) -> list[Length]:
    """Sample lengths in the order a shuffled stream would bring them."""
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in kinds])
    chosen = rng.choice(len(kinds), size=num_samples, p=shares / shares.sum())
    return [_draw_one(kinds[k], rng, any_resolution) for k in chosen]


def _draw_one(kind: Kind, rng: np.random.Generator, any_resolution: bool) -> Length:
    text = max(int(rng.lognormal(np.log(kind.median_text), kind.text_spread)), 8)
    scale = rng.lognormal(0.0, kind.size_spread)
    stretch = rng.lognormal(0.0, kind.size_spread / 2)
    width = max(int(kind.width * scale * stretch), 28)
    height = max(int(kind.height * scale / stretch), 28)
    patches: tuple[int, ...] = ()
    if kind.num_images == 1:
        patches = _patches_of(width, height, any_resolution)
    elif kind.num_images:
        patches = (TILE_PATCHES,) * kind.num_images
    borders = 2 * kind.num_images  # <img> and </img>
    return Length(text + borders + sum(patches) // MERGE**2, patches)


def _patches_of(width: int, height: int, any_resolution: bool) -> tuple[int, ...]:
    if any_resolution:
        rows, columns = native_grid(width, height, PATCH, MERGE)
        return (rows * columns,)
    columns, rows = choose_grid(width, height, TILE, MAX_TILES)
    num_tiles = columns * rows
    return (TILE_PATCHES,) * (num_tiles + (num_tiles > 1))


def digest(lengths: Sequence[Length]) -> str:
    """sha256 of the lengths, first 16 digits: the same digest, the same mix."""
    text = ";".join(f"{s.tokens}:{','.join(map(str, s.patches))}" for s in lengths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(lengths: Sequence[Length]) -> dict[str, float | str]:
    """Mean and spread of a mix, tokens; the share of visual tokens; its digest."""
    tokens = np.array([s.tokens for s in lengths])
    visual = sum(sum(s.patches) for s in lengths) / MERGE**2
    p50, p90, p99 = np.percentile(tokens, (50, 90, 99))
    return {
        "samples": len(lengths),
        "mean_tokens": float(tokens.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": int(tokens.max()),
        "visual_share": float(visual / tokens.sum()),
        "digest": digest(lengths),
    }
