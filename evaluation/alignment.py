"""How far visual tokens lie from the language model's embedding rows (paper section 6.2, Table 7).

The paper leaves open which PCA, how many text rows, which Wasserstein distance, which direction
of nearest neighbour and whether the adapter is included (spec A25). Our choices:

- nearest neighbour runs from visual tokens to text rows; "mean distance" is over all pairs;
- Wasserstein-1 is exact (optimal assignment) on equally many points drawn from both clouds, and
  sliced over random projections beside it;
- every number is measured in several *views*, because no single one tells the whole story:

``adapter``       what the language model reads, full width, many images, as it is
``adapter_unit``  the same with every row scaled to unit RMS; the LM's first operation on a token
                  is an RMSNorm, so this compares directions, free of scale
``adapter_pca``   the paper's recipe on the adapter's output: five images, joint PCA to 2-D
``vit_pca``       the paper's recipe before the adapter: five images; ViT and LM differ in width,
                  so each cloud has its own PCA to 2-D
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

if TYPE_CHECKING:
    from model.modeling import SailVLForConditionalGeneration
    from model.processor import Encoded, SailVLProcessor

PAPER_IMAGES = 5
PAPER_WIDTH = 2
# The assignment is cubic: 768 points take about 0.1 s, 5120 would take minutes.
MAX_MATCHED = 768
# Bounds the [visual, text] distance matrix: 4096 x 4096 float64 is 128 MiB.
MAX_ROWS = 4096
TILE_BATCH = 64

Array = np.ndarray[Any, np.dtype[np.float64]]


class TooFewTokens(ValueError):
    """A cloud is too small for the distance asked for."""


def nearest_neighbour_distance(visual: Array, text: Array) -> float:
    """Mean over visual rows [V, D] of the Euclidean distance to the closest text row [T, D]."""
    return float(cdist(visual, text).min(axis=1).mean())


def mean_overall_distance(visual: Array, text: Array) -> float:
    """Mean Euclidean distance over all pairs of visual [V, D] and text [T, D] rows."""
    return float(cdist(visual, text).mean())


def exact_wasserstein(a: Array, b: Array, rng: np.random.Generator) -> float:
    """Wasserstein-1 between equally many rows of both clouds, by optimal assignment.

    Clouds larger than MAX_MATCHED (or unequal) are sampled down without replacement first.
    """
    size = min(len(a), len(b), MAX_MATCHED)
    left = a[rng.permutation(len(a))[:size]]
    right = b[rng.permutation(len(b))[:size]]
    costs = cdist(left, right)
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean())


def sliced_wasserstein(a: Array, b: Array, projections: int, rng: np.random.Generator) -> float:
    """Mean 1-D Wasserstein-1 over random unit directions, on matched quantiles."""
    directions = rng.standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0, keepdims=True)
    quantiles = (np.arange(MAX_MATCHED) + 0.5) / MAX_MATCHED
    left = np.quantile(a @ directions, quantiles, axis=0)
    right = np.quantile(b @ directions, quantiles, axis=0)
    return float(np.abs(left - right).mean())


def pca(rows: Array, width: int, fit: Array | None = None) -> Array:
    """Rows [N, D] on the first `width` principal axes of `fit` (default: of the rows)."""
    source = rows if fit is None else fit
    if min(source.shape) < width:
        raise TooFewTokens(f"cannot take {width} principal axes of a {source.shape} matrix")
    centre = source.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(source - centre, rowvar=False))
    axes = vectors[:, ::-1][:, :width]
    # eigh leaves the sign open; fix it so that separate fits point the same way.
    axes = axes * np.where(np.abs(axes).max(axis=0) == axes.max(axis=0), 1.0, -1.0)
    return (rows - centre) @ axes


def unit_rms(rows: Array) -> Array:
    """Rows [N, D] scaled to root-mean-square 1, as an RMSNorm with weight 1 does."""
    return rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + 1e-12)


def cloud_distances(
    visual: Array, text: Array, *, projections: int = 128, seed: int = 0
) -> dict[str, float]:
    """Nearest neighbour, exact and sliced Wasserstein-1 and mean distance of two clouds [*, D]."""
    if len(visual) < 2 or len(text) < 2:
        raise TooFewTokens(f"need at least 2 rows each, got {len(visual)} visual, {len(text)} text")
    rng = np.random.default_rng(seed)
    visual, text = _sample(visual, MAX_ROWS, rng), _sample(text, MAX_ROWS, rng)
    return {
        "nearest_neighbour": nearest_neighbour_distance(visual, text),
        "wasserstein": exact_wasserstein(visual, text, rng),
        "sliced_wasserstein": sliced_wasserstein(visual, text, projections, rng),
        "mean_distance": mean_overall_distance(visual, text),
    }


@torch.inference_mode()
def visual_tokens(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    images: Sequence[Image.Image],
) -> tuple[Array, Array, list[int]]:
    """ViT tokens [N, C] before the adapter, LM-side tokens [M, D] after it, M per image."""
    messages = [{"role": "user", "content": "<image>\n"}]
    encoded = [processor.encode(messages, [image]) for image in images]
    was_training = model.training
    model.eval()
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    for features in _vit_features(model, encoded):
        before.append(features.reshape(-1, features.shape[-1]))
        after.append(model.mlp1(features).flatten(0, -2))
    model.train(was_training)
    counts = [int((item.input_ids == processor.image_token_id).sum()) for item in encoded]
    return _numpy(torch.cat(before)), _numpy(torch.cat(after)), counts


def _vit_features(
    model: SailVLForConditionalGeneration, encoded: Sequence[Encoded]
) -> Iterator[torch.Tensor]:
    """Tiles [n, P, C] in batches across images, or images of any size [P, C] one by one."""
    tower = model.vision_model
    if encoded[0].image_grids is None:
        tiles = torch.from_numpy(np.concatenate([item.pixel_values for item in encoded]))
        for batch in tiles.split(TILE_BATCH):
            yield tower.encode(batch.to(tower.device, tower.dtype))
    for item in encoded:
        if item.image_grids is not None:
            patches = torch.from_numpy(item.pixel_values).to(tower.device, tower.dtype)
            grids = torch.from_numpy(item.image_grids)
            yield tower.encode_packed(patches, grids, model.config.downsample)


def text_rows(model: SailVLForConditionalGeneration, num_rows: int, seed: int) -> Array:
    """`num_rows` rows [R, D] of the LM's input embedding table, drawn without replacement."""
    table = cast("torch.nn.Embedding", model.get_input_embeddings()).weight
    generator = np.random.default_rng([seed, 1])
    chosen = np.sort(generator.permutation(len(table))[:num_rows])
    return _numpy(table[torch.from_numpy(chosen)])


def alignment_distances(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    images: Sequence[Image.Image],
    num_text_rows: int,
    seed: int,
    projections: int = 128,
) -> dict[str, Any]:
    """The distances of every view named at the top of this module.

    Args:
        images: RGB images; the paper's views use five of them, chosen by the seed.
        num_text_rows: rows of the embedding table to compare with (at most all of them).
        projections: directions of the sliced Wasserstein distance.

    Returns:
        ``{view: {"nearest_neighbour", "wasserstein", "sliced_wasserstein", "mean_distance"}}``
        plus ``num_images``, ``num_visual_tokens`` and ``num_text_rows``. Equal arguments give
        equal numbers.
    """
    vit, adapted, counts = visual_tokens(model, processor, images)
    text = text_rows(model, num_text_rows, seed)
    rng = np.random.default_rng([seed, 2])
    five = np.sort(rng.permutation(len(images))[:PAPER_IMAGES]).tolist()
    few_adapted = _of_images(adapted, counts, five)
    vit_counts = [count * len(vit) // len(adapted) for count in counts]
    few_vit = _of_images(vit, vit_counts, five)
    both = np.concatenate([few_adapted, text])
    views = {
        "adapter": (adapted, text),
        "adapter_unit": (unit_rms(adapted), unit_rms(text)),
        "adapter_pca": (
            pca(few_adapted, PAPER_WIDTH, fit=both),
            pca(text, PAPER_WIDTH, fit=both),
        ),
        "vit_pca": (pca(few_vit, PAPER_WIDTH), pca(text, PAPER_WIDTH)),
    }
    distances: dict[str, Any] = {
        view: cloud_distances(visual, words, projections=projections, seed=seed)
        for view, (visual, words) in views.items()
    }
    distances["num_images"] = len(images)
    distances["num_visual_tokens"] = len(adapted)
    distances["num_text_rows"] = len(text)
    return distances


def _of_images(rows: Array, counts: Sequence[int], chosen: Sequence[int]) -> Array:
    """The rows that belong to the chosen images, given how many rows each image has."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    return np.concatenate([rows[starts[i] : starts[i + 1]] for i in chosen])


def _sample(rows: Array, limit: int, rng: np.random.Generator) -> Array:
    return rows if len(rows) <= limit else rows[np.sort(rng.permutation(len(rows))[:limit])]


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().cpu().numpy().astype(np.float64)
