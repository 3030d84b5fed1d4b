"""Stages curation.mix_*: training mixes, balanced over data sets and, where asked, over n-grams.

Step one is dataset level: a data set (samples of one source within one input) gets a share
proportional to size ** temperature * weight, never more than MAX_REPEATS passes over it, and what
it cannot supply goes to the others. Step two is linguistic: captions and synthetic questions are
drawn by inverse n-gram frequency instead of evenly (`curation.ngrams`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.ngrams import Corpus, ngram_entropy, ngram_weights, weighted_draw
from sailyard.samples import Sample, SampleReader, read_table, write_samples

if TYPE_CHECKING:
    from sailyard.recipe.data import MixRecipe, NgramBalance
    from sailyard.stage import StageContext

# A small data set may fill its share by being seen twice, not more; our choice.
MAX_REPEATS = 2
# n-gram balance applies to captions and to questions made from them (paper section 3.2.2).
NGRAM_INPUTS = ("captions", "vqa")
# Samples are put in random order a block at a time, so that a mix larger than memory works.
BLOCK = 8192


# How sources of user data begin (see curation.ingest).
USER_PREFIX = "user:"


class EmptyMix(ValueError):
    """No input of a mix holds a sample, or every weight is 0."""


@dataclass(slots=True)
class DataSet:
    """Samples of one source within one input: their positions, and texts where they are needed."""

    input_name: str
    source: str
    weight: float
    positions: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.input_name}/{self.source}"


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of the mix: where it stands and which pass over its data set this is."""

    input_name: str
    position: int
    repeat: int


def text_of(messages: Sequence[Mapping[str, str]], input_name: str) -> str:
    """What n-grams are counted in, without image placeholders.

    Of captions only the caption: the prompts before them are the yard's own few.
    """
    roles = ("assistant",) if input_name == "captions" else ("user", "assistant")
    said = " ".join(m["content"] for m in messages if m["role"] in roles)
    return said.replace("<image>\n", "")


def index_inputs(
    directories: Mapping[str, Path], recipe: MixRecipe, user_weight: float
) -> list[DataSet]:
    """The data sets in the inputs; `user_weight` multiplies the mix's weight of user data.

    Images are not read: source and words are columns of their own.
    """
    found: dict[tuple[str, str], DataSet] = {}
    for input_name, directory in directories.items():
        table = read_table(directory, ["source", "messages"])
        wants_text = recipe.ngram is not None and input_name in NGRAM_INPUTS
        messages = table["messages"].to_pylist() if wants_text else []
        for position, source in enumerate(table["source"].to_pylist()):
            key = (input_name, source)
            if key not in found:
                weight = recipe.weights.get(source, recipe.weights.get(input_name, 1.0))
                weight *= user_weight if source.startswith(USER_PREFIX) else 1.0
                found[key] = DataSet(input_name, source, weight)
            found[key].positions.append(position)
            if wants_text:
                found[key].texts.append(text_of(json.loads(messages[position]), input_name))
    return list(found.values())


def quotas(sizes: list[int], weights: list[float], temperature: float, num: int) -> list[int]:
    """Samples per data set, `num` in all where repeats allow it.

    Shares follow size ** temperature * weight; a data set that would exceed MAX_REPEATS passes is
    filled to that limit and the rest is shared again among the others.
    """
    shares = [s**temperature * w if s else 0.0 for s, w in zip(sizes, weights, strict=True)]
    limits = [s * MAX_REPEATS if share else 0 for s, share in zip(sizes, shares, strict=True)]
    out = [0] * len(sizes)
    open_sets = [i for i, limit in enumerate(limits) if limit]
    left = min(num, sum(limits))
    while open_sets and left:
        total = sum(shares[i] for i in open_sets)
        full = [i for i in open_sets if left * shares[i] / total >= limits[i]]
        if not full:
            _share_out(open_sets, shares, left, limits, out)
            break
        for i in full:
            out[i] = limits[i]
            left -= limits[i]
        open_sets = [i for i in open_sets if i not in full]
    return out


def _share_out(
    members: list[int], shares: list[float], num: int, limits: list[int], out: list[int]
) -> None:
    """Largest remainders: whole numbers that add up to `num`."""
    total = sum(shares[i] for i in members)
    exact = {i: num * shares[i] / total for i in members}
    for i in members:
        out[i] = int(exact[i])
    missing = num - sum(out[i] for i in members)
    for i in sorted(members, key=lambda i: out[i] - exact[i]):
        if missing and out[i] < limits[i]:
            out[i] += 1
            missing -= 1


def draw_set(
    data: DataSet, num: int, ngram: NgramBalance | None, rng: np.random.Generator
) -> list[Draw]:
    """`num` draws from one data set: whole passes first, then a part, by n-gram weight if asked."""
    passes, rest = divmod(num, len(data.positions))
    draws = [Draw(data.input_name, p, r) for r in range(passes) for p in data.positions]
    if data.texts and ngram is not None:
        corpus = Corpus.of(data.texts)
        weights = ngram_weights(corpus, ngram.n, ngram.temperature, ngram.cap)
        chosen = weighted_draw(weights, rest, rng)
    else:
        chosen = rng.permutation(len(data.positions))[:rest]
    return draws + [Draw(data.input_name, data.positions[int(i)], passes) for i in chosen]


def ngram_report(
    sets: list[DataSet], draws: list[list[Draw]], ngram: NgramBalance, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """n-gram entropy of what was drawn ("after") and of an even draw of equal size ("before")."""
    texts: list[str] = []
    before: list[int] = []
    after: list[int] = []
    for data, drawn in zip(sets, draws, strict=True):
        if not data.texts or not drawn:
            continue
        place = {position: len(texts) + i for i, position in enumerate(data.positions)}
        texts += data.texts
        after += [place[draw.position] for draw in drawn]
        before += [place[draw.position] for draw in draw_set(data, len(drawn), None, rng)]
    corpus = Corpus.of(texts)
    return {
        "before": ngram_entropy(corpus.take(before), ngram.n),
        "after": ngram_entropy(corpus.take(after), ngram.n),
    }


def in_blocks(readers: Mapping[str, SampleReader], order: list[Draw]) -> Iterator[Sample]:
    """The samples in `order`, read a block at a time. Repeats get ids of their own."""
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        by_place = sorted(range(len(block)), key=lambda i: (block[i].input_name, block[i].position))
        read: dict[int, Sample] = {}
        for i in by_place:
            draw = block[i]
            sample = readers[draw.input_name][draw.position]
            # Inputs number their samples independently: the input's name keeps ids apart.
            suffix = f"#{draw.repeat}" if draw.repeat else ""
            sample.id = f"{draw.input_name}:{sample.id}{suffix}"
            sample.meta["input"] = draw.input_name
            read[i] = sample
        yield from (read[i] for i in range(len(block)))


def run(ctx: StageContext) -> None:
    """The stage: data sets in, one mix out."""
    recipe: MixRecipe = ctx.section(ctx.stage_name.replace("mix_", "mix."))
    directories = {name: ctx.input(name) for name in ctx.input_names}
    readers = {name: SampleReader(directory) for name, directory in directories.items()}
    rng = np.random.default_rng(ctx.seed)
    sets = index_inputs(directories, recipe, ctx.section("data").weight)
    sizes = [len(data.positions) for data in sets]
    wanted = min(recipe.num_samples, sum(sizes))
    counts = quotas(sizes, [data.weight for data in sets], recipe.temperature, wanted)
    if not sum(counts):
        raise EmptyMix(
            f"{ctx.stage_name}: the inputs {', '.join(readers)} hold {sum(sizes)} samples and "
            "none was drawn; check curation.mix weights and the stages before"
        )
    draws = [draw_set(data, num, recipe.ngram, rng) for data, num in zip(sets, counts, strict=True)]
    flat = [draw for drawn in draws for draw in drawn]
    order = [flat[int(i)] for i in rng.permutation(len(flat))]

    def watched() -> Iterator[Sample]:
        for done, sample in enumerate(in_blocks(readers, order), 1):
            ctx.progress(done, len(order))
            yield sample

    write_samples(ctx.output("mix"), watched())
    summary: dict[str, Any] = {
        "num_samples": len(order),
        "num_available": sum(sizes),
        "sources": {
            data.name: {"available": size, "drawn": num}
            for data, size, num in zip(sets, sizes, counts, strict=True)
        },
    }
    if recipe.ngram is not None:
        summary["ngram_entropy"] = ngram_report(sets, draws, recipe.ngram, rng)
    ctx.summary(**summary)
