"""The bootstrap tower's first lesson: naming what an image shows, before any language.

Two linear heads predict the image's tags, each by its own sigmoid, and are thrown away. One reads
all patches in order and their mean: on two cores that makes colours, shapes, digits and words
readable in about two minutes, where captioning from random weights had learnt none of them after
five. The other reads one visual token at a time and must name the place as well, so every token
learns to say where it stands: what a decoder needs to look at a place (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model.adapter import merge_patches
from model.processor import SailVLProcessor
from model.tiling import to_pixels
from model.vision import SailViT
from sailyard.media import decode_image
from sailyard.recipe import TowerRecipe
from sailyard.samples import OpenFile, read_samples
from sailyard.stage import StageContext
from training.learner import Learner
from training.loop import TrainingLoop
from training.schedules import lr_factor
from training.world import join_world

HELDOUT_SHARE = 0.05


class Tagger(nn.Module):
    """A tower with a linear head over all its patches and one over single visual tokens."""

    def __init__(self, vision: SailViT, num_tags: int, downsample: int) -> None:
        super().__init__()
        self.vision = vision
        self.downsample = downsample
        width = vision.config.hidden_size
        self.head = nn.Linear(width * (vision.config.num_patches + 1), num_tags)
        self.token_head = nn.Linear(width * downsample**2, num_tags)
        # Most tags are absent, and rarer still at one token.
        for head, bias in ((self.head, -4.0), (self.token_head, -6.0)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, S, S] pixels -> [B, num_tags] logits of the image, and of its tokens together.

        A tag counts as named when any token names it: the logits of the tokens, each without its
        neighbours, joined by logsumexp.
        """
        features = self.vision.encode(pixel_values)
        whole = self.head(torch.cat([features.flatten(1), features.mean(dim=1)], dim=1))
        tokens = self.token_head(merge_patches(features, self.downsample))
        return whole, tokens.logsumexp(dim=1)


class TaggedImages:
    """The N tagged images of a dataset, decoded once, and `targets`, their tags: float32 [N, K]."""

    def __init__(self, data: OpenFile, image_size: int) -> None:
        self.images: list[Image.Image] = []
        named: list[list[str]] = []
        for sample in read_samples(data):
            if sample.meta.get("tags") and len(sample.images) == 1:
                image = decode_image(sample.images[0])
                self.images.append(image.resize((image_size, image_size)))
                named.append(sample.meta["tags"])
        if not self.images:
            raise ValueError(f"{data} holds no tagged image: the tower needs meta['tags']")
        self.vocabulary = sorted({tag for names in named for tag in names})
        index = {tag: i for i, tag in enumerate(self.vocabulary)}
        self.targets = torch.zeros(len(self.images), len(self.vocabulary))
        for row, names in enumerate(named):
            self.targets[row, [index[name] for name in names]] = 1.0
        self.num_train = len(self.images) - max(round(HELDOUT_SHARE * len(self.images)), 1)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pixels [B, 3, S, S] and targets [B, K] of the given rows."""
        pixels = to_pixels([self.images[row] for row in rows])
        return torch.from_numpy(pixels), self.targets[torch.from_numpy(rows)]


def pretrain_tower(
    ctx: StageContext,
    vision: SailViT,
    processor: SailVLProcessor,
    recipe: TowerRecipe,
    reference: OpenFile,
) -> dict[str, Any]:
    """Train `vision` in place on the tags of `reference`; returns loss and held-out accuracy.

    Resumes from the stage's newest checkpoint.
    """
    data = TaggedImages(reference, processor.image_size)
    world = join_world()
    tagger = Tagger(vision, len(data.vocabulary), processor.downsample).train().to(world.device)
    optimizer = torch.optim.AdamW(
        tagger.parameters(),
        lr=recipe.lr,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    learner = Learner(tagger, optimizer, world, clip_norm=recipe.clip_norm)
    loop = TrainingLoop(
        ctx,
        learner,
        world,
        total_steps=recipe.steps,
        checkpoint_every=recipe.checkpoint_every,
        name="tower",
        save_last=True,
    )
    resumed = loop.resume()
    losses: list[float] = resumed[0]["losses"] if resumed else []

    def one_step(step: int) -> None:
        losses.append(_step(learner, data, recipe, step, ctx.seed))
        ctx.metric(step, **{"tower/loss": losses[-1]})
        ctx.progress(step + 1, recipe.steps, f"tower loss {losses[-1]:.2f}")

    loop.run(one_step, lambda: {"losses": losses})
    edge = max(len(losses) // 10, 1)
    return {
        "steps": recipe.steps,
        "loss_first": sum(losses[:edge]) / edge,
        "loss_last": sum(losses[-edge:]) / edge,
        "num_images": data.num_train,
        "num_tags": len(data.vocabulary),
        "heldout_recall": _heldout_recall(tagger, data),
    }


def _step(learner: Learner, data: TaggedImages, recipe: TowerRecipe, step: int, seed: int) -> float:
    rng = np.random.default_rng([seed, step])  # stateless: a resumed run draws the same
    rows = rng.integers(0, data.num_train, recipe.batch_size)
    pixels, targets = data.batch(rows[learner.world.share(len(rows))])
    device = learner.world.device
    factor = lr_factor(step, recipe.steps, schedule="cosine", warmup_ratio=0.05, min_lr_ratio=0.05)
    losses = (
        F.binary_cross_entropy_with_logits(logits, targets.to(device), reduction="sum")
        for logits in learner.forward(True, pixel_values=pixels.to(device))
    )
    loss = torch.stack(list(losses)).sum() / recipe.batch_size
    learner.backward(loss, last=True)
    learner.update(recipe.lr * factor)
    return learner.world.sum([float(loss.detach())])[0]


@torch.inference_mode()
def _heldout_recall(tagger: Tagger, data: TaggedImages) -> dict[str, float]:
    """Share of held-out tags found, by kind of tag (what stands before the colon)."""
    rows = np.arange(data.num_train, len(data.images))
    hits: dict[str, list[int]] = {}
    for start in range(0, len(rows), 128):
        pixels, targets = data.batch(rows[start : start + 128])
        found = (tagger(pixels.to(tagger.head.weight.device))[0].cpu() > 0) & (targets > 0)
        for column, tag in enumerate(data.vocabulary):
            place = tag.split(":")[0]
            entry = hits.setdefault("cell" if place.isdigit() else place, [0, 0])
            entry[0] += int(found[:, column].sum())
            entry[1] += int(targets[:, column].sum())
    return {kind: found / total for kind, (found, total) in sorted(hits.items()) if total}
