"""AnyRes images through SAIL-ViT in one packed call, against padding them to the longest.

Images have log-uniform sides from 112 to 896 pixels (our choice: no public record gives the sizes
of the paper's data), so the largest has up to 64 times the patches of the smallest. The padded
tower computes the same features (checked) on batches of `batch` images, in the order they come
and sorted by size, which is the best that padding can do. All three take turns; what counts is
the median of the ratios of one turn.

    python -m benchmarks.vision --json
    python -m benchmarks.vision --json --device cuda --recipe 2b      # the Huge tower in bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from model.checkpoint import build_vision
from model.config import vision_config_of
from model.patches import to_patches
from model.vision import SailViT
from sailyard.recipe import load_recipe

Images = list[tuple[torch.Tensor, tuple[int, int]]]  # patches [P, C] and grid of each


def draw_images(count: int, seed: int, patch_size: int, downsample: int) -> Images:
    """Noise of drawn sizes: the tower's time does not depend on what an image shows."""
    rng = np.random.default_rng(seed)
    images: Images = []
    for width, height in np.exp(rng.uniform(np.log(112), np.log(896), (count, 2))).astype(int):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        patches, grid = to_patches(Image.fromarray(pixels), patch_size, downsample)
        images.append((torch.from_numpy(patches), grid))
    return images


def packed(tower: SailViT, images: Images, downsample: int) -> list[torch.Tensor]:
    """Features [P, D] of each image."""
    patches = torch.cat([patches for patches, _ in images])
    grids = torch.tensor([grid for _, grid in images])
    features = tower.encode_packed(patches, grids, downsample)
    return list(features.split([len(patches) for patches, _ in images]))


def padded(tower: SailViT, images: Images, downsample: int) -> list[torch.Tensor]:
    """The same features, by blocks over [N, longest, D] with the padding masked."""
    longest = max(len(patches) for patches, _ in images)
    conv = tower.embeddings.patch_embed
    rows = [F.pad(patches, (0, 0, 0, longest - len(patches))) for patches, _ in images]
    hidden = tower.embeddings.rms_norm(
        F.linear(torch.stack(rows), conv.weight.flatten(1), conv.bias)
    )
    places = [tower.positions([grid], downsample) for _, grid in images]
    table = torch.stack([F.pad(place, (0, 0, 0, longest - len(place))) for place in places])
    lengths = torch.tensor([len(patches) for patches, _ in images], device=hidden.device)
    mask = torch.arange(longest, device=hidden.device) < lengths[:, None]
    hidden = hidden + table.to(hidden.dtype)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, mask[:, None, None])
    features = tower.rms_norm(hidden)
    return [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]


def in_batches(
    run: Callable[[Images], list[torch.Tensor]], images: Images, batch: int
) -> list[torch.Tensor]:
    """Features of all images, `batch` at a time."""
    return [f for start in range(0, len(images), batch) for f in run(images[start : start + batch])]


def waste(images: Images, batch: int) -> float:
    """Share of a padded batch that is padding, all batches together."""
    lengths = [len(patches) for patches, _ in images]
    rows = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)


@torch.inference_mode()
def measure(tower: SailViT, images: Images, batch: int, repeats: int, downsample: int) -> dict:
    """Images per second of each way and the ratios to packing."""
    by_size = sorted(images, key=lambda image: len(image[0]))
    ways = {
        "packed": lambda: in_batches(lambda b: packed(tower, b, downsample), images, batch),
        "padded": lambda: in_batches(lambda b: padded(tower, b, downsample), images, batch),
        "padded_sorted": lambda: in_batches(lambda b: padded(tower, b, downsample), by_size, batch),
    }
    difference = max(
        float((a - b).abs().max()) for a, b in zip(ways["packed"](), ways["padded"](), strict=True)
    )
    ways["padded_sorted"]()  # warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way, images[0][0].is_cuda))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(
            slow / fast for slow, fast in zip(seconds[name], seconds["packed"], strict=True)
        )
        for name in ("padded", "padded_sorted")
    }
    return {
        "images_per_second": {name: len(images) / median for name, median in medians.items()},
        "packed_is_faster_by": ratios,
        "padding": {"padded": waste(images, batch), "padded_sorted": waste(by_size, batch)},
        "largest_difference_of_a_feature": difference,
    }


def timed(way: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__)
    parser.add_argument("--recipe", default="small", help="whose tower")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="images in one call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    shape = load_recipe(args.recipe).model
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    tower = build_vision(vision_config_of(shape.vision)).to(args.device, dtype).eval()
    drawn = draw_images(args.images, args.seed, shape.vision.patch_size, shape.downsample)
    images = [(patches.to(args.device, dtype), grid) for patches, grid in drawn]
    patch_counts = sorted(len(patches) for patches, _ in images)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "tower": args.recipe,
        "patches_of_an_image": {
            "least": patch_counts[0],
            "median": statistics.median(patch_counts),
            "most": patch_counts[-1],
        },
        **measure(tower, images, args.batch, args.repeats, shape.downsample),
    }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for name, rate in result["images_per_second"].items():
        faster = result["packed_is_faster_by"].get(name)
        print(f"{name:14} {rate:8.2f} images/s" + (f"  packed is {faster:.2f}x" if faster else ""))


if __name__ == "__main__":
    main()
