"""n-gram rebalancing: rare phrasings weigh more, common ones less (paper section 3.2.2).

The paper gives the idea only. Ours (spec A11): a text's openings (its first n words) and its body
n-grams are counted over the corpus; its frequency is the geometric mean of the two shares, and it
weighs frequency ** -temperature, averaged over n and capped at a multiple of the mean weight, so
that rare noise is not repeated without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Words, single marks, and single characters of scripts that put no spaces between words.
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_]+|[^\w\s]|_")
# An odd 64-bit number: hashes of n-grams are sums of its powers, wrapping.
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Lower-case tokens: words, punctuation marks, single CJK characters."""
    return _TOKEN.findall(text.lower())


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts as token ids: those of text i are ids[starts[i]:starts[i + 1]]. No text is empty."""

    ids: np.ndarray  # uint64 [num_tokens]
    starts: np.ndarray  # int64 [num_texts + 1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Corpus:
        """Tokenise texts; one without a token counts as a single empty one."""
        vocabulary: dict[str, int] = {}
        ids: list[int] = []
        starts = [0]
        for text in texts:
            # Ids begin at 1: a 0 would vanish from a sum.
            ids += [vocabulary.setdefault(t, len(vocabulary) + 1) for t in words(text) or [""]]
            starts.append(len(ids))
        return cls(np.array(ids, dtype=np.uint64), np.array(starts))

    @property
    def num_texts(self) -> int:
        return len(self.starts) - 1

    def take(self, positions: Sequence[int]) -> Corpus:
        """The texts at `positions`, in that order; a text may be taken twice."""
        pieces = [self.ids[self.starts[i] : self.starts[i + 1]] for i in positions]
        lengths = [len(piece) for piece in pieces]
        ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint64)
        return Corpus(ids, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def hashes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hash of the n-gram at each token, uint64; whether it ends inside its text, bool).

        A text shorter than n counts as one n-gram, which stands at its first token.
        """
        num = len(self.ids)
        ends = np.repeat(self.starts[1:], np.diff(self.starts))
        place = np.arange(num)
        out = np.zeros(num, dtype=np.uint64)
        power = np.uint64(1)
        for k in range(n):
            power = np.uint64(int(power) * int(_BASE) & 0xFFFFFFFFFFFFFFFF)
            inside = place + k < ends
            shifted = np.zeros(num, dtype=np.uint64)
            shifted[: num - k] = self.ids[k:]
            # Bits are mixed before they are summed, or small ids would collide.
            out += np.where(inside, (shifted * _BASE ^ (shifted << np.uint64(29))) * power, 0)
        first = np.zeros(num, dtype=bool)
        first[self.starts[:-1]] = True
        return out, (place + n <= ends) | (first & (place + n > ends))


def _counts(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(count of each different hash, count of each hash's own value in place)."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return counts, counts[inverse]


def frequencies(corpus: Corpus, n: int) -> np.ndarray:
    """Per text, the geometric mean of its opening's share and its body n-grams' mean share."""
    hashes, valid = corpus.hashes(n)
    openings = hashes[corpus.starts[:-1]]
    share_open = _counts(openings)[1] / corpus.num_texts
    own = np.zeros(len(hashes))
    own[valid] = _counts(hashes[valid])[1] / valid.sum()
    num_grams = np.add.reduceat(valid.astype(np.int64), corpus.starts[:-1])
    share_body = np.add.reduceat(own, corpus.starts[:-1]) / num_grams
    return np.sqrt(share_open * share_body)


def ngram_weights(
    corpus: Corpus, lengths: Sequence[int], temperature: float, cap: float
) -> np.ndarray:
    """Sampling weights [num_texts], mean at most 1, none above `cap` times the uncapped mean.

    Args:
        corpus: weights are relative to it.
        lengths: n of the n-grams.
        temperature: 0 would keep the distribution, 1 weighs by inverse frequency.
        cap: largest ratio of a weight to the mean weight.
    """
    if not corpus.num_texts:
        return np.zeros(0)
    weights = np.mean([frequencies(corpus, n) ** -temperature for n in lengths], axis=0)
    weights /= weights.mean()
    return np.minimum(weights, cap)


def ngram_entropy(corpus: Corpus, lengths: Sequence[int]) -> dict[str, float]:
    """Shannon entropy, bits, of openings and body n-grams: "opening_2", "body_2", ..."""
    out = {}
    for n in lengths:
        hashes, valid = corpus.hashes(n)
        out[f"opening_{n}"] = _entropy(hashes[corpus.starts[:-1]])
        out[f"body_{n}"] = _entropy(hashes[valid])
    return out


def _entropy(hashes: np.ndarray) -> float:
    if not len(hashes):
        return 0.0
    shares = _counts(hashes)[0] / len(hashes)
    return float(-(shares * np.log2(shares)).sum())


def weighted_draw(weights: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` different positions, drawn in proportion to their weights (Efraimidis-Spirakis)."""
    # log(u) / w orders as u ** (1 / w) does, without underflow.
    keys = np.log(rng.random(len(weights))) / np.maximum(weights, 1e-12)
    return np.argsort(-keys, kind="stable")[:num]
