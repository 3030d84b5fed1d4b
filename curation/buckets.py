"""Latent classes: k-means over phrase embeddings, and an even draw over its buckets.

The paper clusters into almost ten times as many classes as there were categories and samples
them uniformly (section 4.1.2), without naming an algorithm; k-means is our choice (spec A12).
Written out here rather than taken from a library so that the same seed gives the same buckets on
any number of threads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

ITERATIONS = 30
# Distances of this many rows are held at once: 4096 x 1000 float32 is 16 MB.
CHUNK = 4096


def nearest(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the closest centre [N] and the squared distance to it [N]."""
    labels = np.empty(len(rows), dtype=np.int64)
    distances = np.empty(len(rows))
    norms = (centres**2).sum(axis=1)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        table = norms - 2.0 * part @ centres.T
        labels[start : start + CHUNK] = table.argmin(axis=1)
        distances[start : start + CHUNK] = table.min(axis=1) + (part**2).sum(axis=1)
    return labels, np.maximum(distances, 0.0)


def kmeans(rows: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    """Bucket of each row [N] by Lloyd's algorithm from k-means++ centres.

    Rows [N, D] are scaled to unit length first, so that closeness is cosine. Buckets that run
    empty keep their centre, so fewer than `num_buckets` labels may occur.

    Raises:
        ValueError: no rows or no buckets.
    """
    if not len(rows) or num_buckets < 1:
        raise ValueError(f"cannot put {len(rows)} rows into {num_buckets} buckets")
    unit = rows.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    centres = _spread(unit, min(num_buckets, len(unit)), np.random.default_rng(seed))
    labels = np.full(len(unit), -1)
    for _ in range(ITERATIONS):
        found, _ = nearest(unit, centres)
        if (found == labels).all():
            break
        labels = found
        counts = np.bincount(labels, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, unit)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return labels


def _spread(rows: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each centre is a row, drawn in proportion to its squared distance so far."""
    chosen = [int(rng.integers(len(rows)))]
    _, distances = nearest(rows, rows[chosen])
    while len(chosen) < num:
        total = distances.sum()
        if total <= 1e-12:
            break  # fewer different rows than buckets
        mark = rng.random() * total
        chosen.append(int(min(np.searchsorted(distances.cumsum(), mark), len(rows) - 1)))
        _, fresh = nearest(rows, rows[chosen[-1:]])
        distances = np.minimum(distances, fresh)
    return rows[chosen].copy()


def draw_evenly(labels: Sequence[Hashable], target: int, seed: int) -> list[int]:
    """Positions of `target` items, every bucket giving equally many as long as it lasts.

    Small buckets give all they have; the rest is shared by the larger ones. No item is drawn
    twice, so fewer than `target` come back when there are fewer.
    """
    rng = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for position in rng.permutation(len(labels)).tolist():
        members.setdefault(labels[position], []).append(position)
    drawn: list[int] = []
    waiting = [members[name] for name in sorted(members, key=str)]
    while waiting and len(drawn) < target:
        order = rng.permutation(len(waiting)).tolist()
        drawn += [waiting[index].pop() for index in order[: target - len(drawn)]]
        waiting = [bucket for bucket in waiting if bucket]
    return sorted(drawn)


def evenness(labels: Sequence[Hashable], num_classes: int) -> float:
    """How evenly items spread over the classes: entropy over its greatest possible value, 0-1.

    The greatest value is log min(items, classes): few items cannot fill many classes.
    """
    counts = Counter(labels)
    total = sum(counts.values())
    most = math.log(max(min(total, num_classes), 1))
    if most == 0.0:
        return 1.0
    return -sum(c / total * math.log(c / total) for c in counts.values()) / most
