"""AnyRes: images of any size in one packed call, each as if it were alone."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from model.batching import image_inputs
from model.config import SailViTConfig
from model.patches import MAX_PATCHES, cell_order, native_grid, to_patches
from model.processor import SailVLProcessor
from model.tiling import to_pixels
from model.vision import SailViT
from tests.model.tiny import FLASH, SIZE, image, network, processor, tokenizer, vision_config

SIZES = [(SIZE, SIZE), (28, 28), (140, 57), (33, 200), (SIZE, SIZE)]  # width, height


def patches_of(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    made = [to_patches(picture) for picture in images]
    flat = torch.from_numpy(np.concatenate([patches for patches, _ in made]))
    return flat, torch.tensor([grid for _, grid in made])


def tower(rope_2d: bool = False, attention: str = "sdpa") -> SailViT:
    torch.manual_seed(0)
    config = vision_config()
    config.rope_2d = rope_2d
    return SailViT._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (448, 448, (32, 32)),
        (1792, 1792, (128, 128)),
        (1, 1, (2, 2)),
        (50, 50, (4, 4)),  # the three sizes that the paper's Figure 2 draws
        (280, 160, (12, 20)),
        (3580, 2260, (100, 160)),
        (1, 5000, (358, 2)),
        (200_000, 1, (2, 8192)),
    ],
)
def test_grid_of(width, height, grid):
    assert native_grid(width, height) == grid


def test_grids_are_whole_squares_within_the_limit_and_keep_the_aspect():
    rng = np.random.default_rng(0)
    for width, height in (2 ** rng.uniform(0, 13, (300, 2))).astype(int):
        rows, columns = native_grid(int(width), int(height))
        assert rows % 2 == columns % 2 == 0
        assert 4 <= rows * columns <= MAX_PATCHES
        if min(rows, columns) >= 20:  # then rounding moves a side by less than a tenth
            assert columns / rows == pytest.approx(width / height, rel=0.11)


def test_a_size_without_pixels_is_named():
    with pytest.raises(ValueError, match="0 x 5"):
        native_grid(0, 5)
    with pytest.raises(ValueError, match="max_patches 3"):
        native_grid(5, 5, max_patches=3)


def test_cell_order_is_the_adapters_merge_order():
    assert cell_order(2, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("rope_2d", [False, True])
def test_at_the_tile_size_anyres_is_the_fixed_path(rope_2d):
    model = network()
    model.vision_model.config.rope_2d = rope_2d
    pictures = [image(1), image(2)]
    patches, grids = patches_of(pictures)
    with torch.inference_mode():
        tiles = model.encode_images(torch.from_numpy(to_pixels(pictures)))
        native = model.encode_images(patches, grids)
    torch.testing.assert_close(native, tiles.flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_2d", [False, True])
def test_so_it_is_at_the_released_tile_size(rope_2d):
    torch.manual_seed(0)
    config = SailViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        rope_2d=rope_2d,
    )
    vision = SailViT._from_config(config, attn_implementation="sdpa").eval()
    picture = image(1, 448, 448)
    order = torch.from_numpy(cell_order(32, 32))
    with torch.inference_mode():
        tile = vision.encode(torch.from_numpy(to_pixels([picture])))[0]
        native = vision.encode_packed(*patches_of([picture]))
    torch.testing.assert_close(native, tile[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "patches", "tiles"),
    [(1, 1, 4, 1), (1, 5000, 716, 5), (5000, 1, 716, 5), (3580, 2260, 16_000, 3)],
)
def test_odd_sizes_work_as_tiles_and_at_their_own_size(width, height, patches, tiles):
    """4 tiles at most here, and the whole image once more."""
    model, question = network(), [{"role": "user", "content": "<image>\nwhat?"}]
    shown = image(1, width, height)
    for made, rows, tokens in (
        (processor(), tiles, 4 * tiles),
        (any_resolution(), patches, patches // 4),
    ):
        encoded = made.encode(question, [shown])
        assert len(encoded.pixel_values) == rows
        assert (encoded.input_ids == made.image_token_id).sum() == tokens
        inputs = image_inputs([encoded])
        with torch.inference_mode():
            seen = model.encode_images(inputs["pixel_values"], inputs["image_grids"])
        assert seen.reshape(-1, seen.shape[-1]).shape == (tokens, 32)
        assert seen.isfinite().all()


def test_rope_turns_by_place():
    patches, grids = patches_of([image(1, 84, 112)])
    plain, turned = tower(), tower(rope_2d=True)
    turned.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        difference = plain.encode_packed(patches, grids) - turned.encode_packed(patches, grids)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("rope_2d", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_images_are_as_if_alone(rope_2d, attention):
    vision = tower(rope_2d, attention)
    pictures = [image(number, *size) for number, size in enumerate(SIZES)]
    with torch.inference_mode():
        packed = vision.encode_packed(*patches_of(pictures))
        alone = torch.cat([vision.encode_packed(*patches_of([picture])) for picture in pictures])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_no_gradient_crosses_images():
    vision = tower()
    patches, grids = patches_of([image(number, *size) for number, size in enumerate(SIZES)])
    patches.requires_grad_()
    ends = grids.prod(dim=1).cumsum(0)
    features = vision.encode_packed(patches, grids)
    features[ends[1] : ends[2]].square().sum().backward()  # the third image
    assert patches.grad is not None
    assert patches.grad[ends[1] : ends[2]].abs().min(dim=1).values.max() > 0
    assert torch.all(patches.grad[: ends[1]] == 0)
    assert torch.all(patches.grad[ends[2] :] == 0)


def test_a_back_end_for_packed_rows_gets_the_places_of_the_images():
    patches, grids = patches_of([image(number, *size) for number, size in enumerate(SIZES)])
    vision, other = tower(), tower()
    other.config._attn_implementation = FLASH
    with torch.inference_mode():
        torch.testing.assert_close(
            vision.encode_packed(patches, grids), other.encode_packed(patches, grids)
        )


def test_the_position_table_bends_to_the_grid():
    """A table that counts columns still counts them, in steps of its own grid."""
    vision = tower()
    side = vision.config.grid_size
    with torch.no_grad():
        vision.embeddings.position_embedding.weight[:] = (torch.arange(side**2) % side)[:, None]
        fine = vision.positions([(2 * side, 4 * side)], 1)[:, 0].view(2 * side, 4 * side)
    assert torch.allclose(fine, fine[:1].expand_as(fine), atol=1e-5)
    inner = fine[0, 8:-8].diff()
    torch.testing.assert_close(inner, torch.full_like(inner, 1 / 4))


def test_patches_and_grids_that_do_not_match_are_named():
    patches, grids = patches_of([image(1)])
    with pytest.raises(ValueError, match=r"grids \[\(4, 4\), \(4, 4\)\] need patches \[32, 588\]"):
        tower().encode_packed(patches, grids.repeat(2, 1))


def test_the_network_reads_images_of_any_size():
    model = network()
    patches, grids = patches_of([image(1, 84, 28), image(2, 28, 28)])
    ids = torch.tensor([[5, *[model.config.image_token_id] * 3, 6, model.config.image_token_id]])
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=patches, image_grids=grids).logits
        swapped = model(input_ids=ids, pixel_values=patches.flip(0), image_grids=grids).logits
    assert logits.shape[:2] == ids.shape
    assert (logits - swapped).abs().max() > 1e-3
    more = torch.cat((ids, ids[:, 1:2]), dim=1)
    with pytest.raises(ValueError, match="5 <IMG_CONTEXT> tokens for 16 patches, which need 4"):
        model(input_ids=more, pixel_values=patches, image_grids=grids)


LARGEST = """
import resource
import torch
from model.config import SailViTConfig
from model.vision import SailViT
from tests.model.test_any_resolution import patches_of
from tests.model.tiny import image

config = SailViTConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8
)
vision = SailViT._from_config(config, attn_implementation="sdpa")
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
for side in (896, 1792):
    features = vision.encode_packed(*patches_of([image(1, side, side)]))
    if side == 896:  # a CPU's backward pass takes a core half a minute for the largest
        features.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vision.parameters())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(len(features), peaks[1] - peaks[0], peaks[2] - peaks[0])
"""


@pytest.mark.slow
def test_the_largest_image_needs_no_square_of_its_patches():
    """16,384 patches: their scores alone would be 8 GiB; backward at 4,096, of 0.5 GiB of scores.

    In a process of its own, since a process's peak never falls.
    """
    run = [sys.executable, "-c", LARGEST]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    num_patches, backward, forward = map(int, done.stdout.split())
    assert num_patches == MAX_PATCHES
    assert backward < 300 * 2**10  # KiB
    assert forward < 500 * 2**10


def any_resolution(max_patches: int = MAX_PATCHES) -> SailVLProcessor:
    return SailVLProcessor(
        tokenizer(),
        image_size=SIZE,
        system_message="",
        any_resolution=True,
        max_patches=max_patches,
    )


def test_the_processor_writes_a_placeholder_for_every_square():
    question = [{"role": "user", "content": "<image>\n<image>\nwhich is red?"}]
    encoded = any_resolution().encode(question, [image(1, 84, 56), image(2, 20, 20)])
    assert encoded.image_grids.tolist() == [[4, 6], [2, 2]]
    assert encoded.pixel_values.shape == (28, 588)
    assert (encoded.input_ids == any_resolution().image_token_id).sum() == 28 // 4
    frames = any_resolution().encode(question, [image(1, 84, 56), image(2, 20, 20)], is_video=True)
    assert frames.image_grids.tolist() == [[4, 4], [4, 4]]
    small = any_resolution(max_patches=16).encode(question, [image(1, 560, 560), image(2)])
    assert small.image_grids.tolist() == [[4, 4], [4, 4]]
    assert any_resolution().encode([{"role": "user", "content": "hi"}]).pixel_values.shape[0] == 0


def test_packed_conversations_equal_conversations_alone():
    model, processor = network(), any_resolution()
    ask = [{"role": "user", "content": "<image>\nhow many?"}]
    both = [{"role": "user", "content": "<image><image> which?"}]
    encoded = [
        processor.encode(ask, [image(1, 100, 40)]),
        processor.encode([{"role": "user", "content": "one two"}]),
        processor.encode(both, [image(2, 30, 30), image(3, 60, 90)]),
    ]
    ids = torch.from_numpy(np.concatenate([item.input_ids for item in encoded]))[None]
    lengths = torch.tensor([len(item.input_ids) for item in encoded])
    segments = torch.arange(1, 4).repeat_interleave(lengths)[None]
    with torch.inference_mode():
        packed = model(ids, **image_inputs(encoded), attention_mask=segments).logits[0]
        alone = [
            model(torch.from_numpy(item.input_ids)[None], **image_inputs([item])).logits[0]
            for item in encoded
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)


def test_a_saved_processor_keeps_its_resolution(tmp_path):
    any_resolution(max_patches=64).save_pretrained(tmp_path)
    found = SailVLProcessor.from_pretrained(tmp_path)
    assert (found.any_resolution, found.max_patches) == (True, 64)
