"""Greedy soup: ingredients join one after another while a validation metric does not fall.

After Wortsman et al., "Model soups" (arXiv 2203.05482, recipe 1): ingredients are taken in order of
their own metric, best first, and each stays only if the average with it is at least as good as
without. So by that metric the soup is never worse than its best ingredient. Averages are written
to disk and read back like any checkpoint: one network is in memory, however many there are.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_model
from sailyard.samples import Sample, SampleReader
from training.averaging import average
from training.packing import collate_rows, on_device, pack_rows
from training.supervised import Encoder
from training.world import join_world

ROW_TOKENS = 2048
"""Validation samples are packed into rows of this length, or of the longest sample's."""


def choose(
    ingredients: Mapping[str, Path],
    weights: Mapping[str, float],
    loss: Callable[[Path], float],
    scratch: Path,
) -> dict[str, Any]:
    """Which ingredients a greedy soup takes, and what was seen on the way.

    Args:
        loss: Of a checkpoint on the validation samples; lower is better.
        scratch: Where averages are tried; nothing is left there.

    Returns:
        `taken` and `refused` names, `ingredient_loss`, and `tried`: each average's names and loss.
    """
    alone = {name: loss(path) for name, path in ingredients.items()}
    first, *others = sorted(alone, key=lambda name: (alone[name], name))
    taken, best, refused = [first], alone[first], []
    tried: list[dict[str, Any]] = []
    for name in others:
        names = [*taken, name]
        target = scratch / "greedy"
        average({n: ingredients[n] for n in names}, {n: weights[n] for n in names}, target)
        found = loss(target)
        shutil.rmtree(target)
        tried.append({"ingredients": names, "loss": found})
        if found <= best:
            taken, best = names, found
        else:
            refused.append(name)
    return {
        "taken": taken,
        "refused": refused,
        "ingredient_loss": alone,
        "tried": tried,
        "loss": best,
    }


def validation_samples(directory: Path, per_skill: int) -> list[Sample]:
    """The last `per_skill` samples of each skill, in stored order.

    The evaluation suite takes the first of each skill, so the two meet only where the set is too
    small for both.
    """
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in SampleReader(directory):
        found[str(sample.meta.get("skill", sample.task))].append(sample)
    return [sample for samples in found.values() for sample in samples[-per_skill:]]


@torch.inference_mode()
def token_loss(checkpoint: Path, samples: Sequence[Sample]) -> float:
    """Mean cross-entropy per labelled token of a checkpoint on samples, nats, in float32."""
    model, processor = load_model(checkpoint)
    device = join_world().device
    model.to(device).eval()
    encoder = Encoder(processor)
    encoded = [encoder.decode(sample, encoder(sample)) for sample in samples]
    lengths = [len(one.input_ids) for one in encoded]
    width = max(ROW_TOKENS, *lengths)
    total, count = 0.0, 0
    for row in pack_rows(lengths, width):
        batch = on_device(collate_rows([[encoded[i] for i in row]], width), device)
        output = model(
            input_ids=batch["input_ids"],
            **batch["images"],
            position_ids=batch["position_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
            use_cache=False,
        )
        total += float(output.loss_per_token.double().sum())
        count += output.loss_per_token.numel()
    if not count:
        raise ValueError(
            "no validation sample carries an answer, so a greedy soup has nothing to go by: set "
            "post_training.soup.method to average"
        )
    return total / count
