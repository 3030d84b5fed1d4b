"""n-gram rebalancing: rare phrasings weigh more, common ones less (paper section 3.2.2).

The paper gives the idea only. Ours (spec A11): a text's openings (its first n words) and its body
n-grams are counted over the corpus; its frequency is the geometric mean of the two shares, and it
weighs frequency ** -temperature, averaged over n and capped at a multiple of the mean weight, so
that rare noise is not repeated without end.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Gram = tuple[str, ...]
# Words, single marks, and single characters of scripts that put no spaces between words.
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_]+|[^\w\s]|_")


def words(text: str) -> list[str]:
    """Lower-case tokens: words, punctuation marks, single CJK characters."""
    return _TOKEN.findall(text.lower())


def opening(tokens: Sequence[str], n: int) -> Gram:
    """The first `n` tokens (all of them when there are fewer)."""
    return tuple(tokens[:n])


def body(tokens: Sequence[str], n: int) -> list[Gram]:
    """Every n-gram of the tokens; of a shorter text the text itself."""
    if len(tokens) <= n:
        return [tuple(tokens)]
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


class NgramCounts:
    """Openings and body n-grams of a corpus, for several n."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.openings: dict[int, Counter[Gram]] = {n: Counter() for n in lengths}
        self.bodies: dict[int, Counter[Gram]] = {n: Counter() for n in lengths}

    def add(self, text: str) -> None:
        """Count one text."""
        tokens = words(text)
        for n in self.lengths:
            self.openings[n][opening(tokens, n)] += 1
            self.bodies[n].update(body(tokens, n))

    def totals(self) -> dict[int, tuple[int, int]]:
        """Per n, how many openings and how many body n-grams were counted."""
        return {n: (self.openings[n].total(), self.bodies[n].total()) for n in self.lengths}

    def frequency(self, text: str, n: int, totals: dict[int, tuple[int, int]]) -> float:
        """Geometric mean of the share of the text's opening and of its body n-grams."""
        tokens = words(text)
        num_openings, num_bodies = totals[n]
        grams = body(tokens, n)
        share_open = self.openings[n][opening(tokens, n)] / num_openings
        share_body = sum(self.bodies[n][g] for g in grams) / len(grams) / num_bodies
        return math.sqrt(share_open * share_body)

    def entropy(self) -> dict[str, float]:
        """Shannon entropy in bits of the openings and body n-grams, "opening_2", "body_2", ..."""
        out = {}
        for n in self.lengths:
            out[f"opening_{n}"] = _entropy(self.openings[n])
            out[f"body_{n}"] = _entropy(self.bodies[n])
        return out


def _entropy(counts: Counter[Gram]) -> float:
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def count_ngrams(texts: Iterable[str], lengths: Sequence[int]) -> NgramCounts:
    """Count a corpus."""
    counts = NgramCounts(lengths)
    for text in texts:
        counts.add(text)
    return counts


def ngram_weights(
    texts: Sequence[str], lengths: Sequence[int], temperature: float, cap: float
) -> np.ndarray:
    """Sampling weights [len(texts)], mean about 1, none above `cap` times the uncapped mean.

    Args:
        texts: the corpus; weights are relative to it.
        lengths: n of the n-grams.
        temperature: 0 would keep the distribution, 1 weighs by inverse frequency.
        cap: largest ratio of a weight to the mean weight.
    """
    if not texts:
        return np.zeros(0)
    counts = count_ngrams(texts, lengths)
    totals = counts.totals()
    frequencies = np.array([[counts.frequency(t, n, totals) for n in lengths] for t in texts])
    weights = np.mean(frequencies**-temperature, axis=1)
    weights /= weights.mean()
    return np.minimum(weights, cap)


def weighted_draw(weights: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` different positions, drawn in proportion to their weights (Efraimidis-Spirakis)."""
    keys = rng.random(len(weights)) ** (1 / np.maximum(weights, 1e-12))
    return np.argsort(-keys, kind="stable")[:num]
