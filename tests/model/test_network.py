"""The network: merge order, packing, gradients, parts, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.adapter import Adapter, merge_patches
from model.config import SailVLConfig
from model.masks import block_mask, block_positions, segments_of
from model.modeling import freeze_except, part_digests
from tests.model.tiny import (
    FLASH,
    language_config,
    network,
    pack,
    processor,
    samples,
    vision_config,
)


@pytest.mark.parametrize("downsample", [2, 4])
def test_merge_order_is_v2(downsample):
    grid, width, tiles = 8, 3, 2
    features = torch.arange(tiles * grid * grid * width).float().view(tiles, grid * grid, width)
    merged = merge_patches(features, downsample)
    cells = grid // downsample
    assert merged.shape == (tiles, cells * cells, downsample * downsample * width)
    for tile in range(tiles):
        for i in range(cells):
            for j in range(cells):
                expected = [
                    features[tile, (downsample * i + di) * grid + downsample * j + dj]
                    for di in range(downsample)
                    for dj in range(downsample)
                ]
                assert torch.equal(merged[tile, i * cells + j], torch.cat(expected))


def test_adapter_is_the_released_sequential():
    adapter = Adapter(vision_width=4, language_width=6)
    kinds = [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert [type(module) for module in adapter] == kinds
    assert [list(p.shape) for p in adapter.parameters()] == [[16], [16], [6, 16], [6], [6, 6], [6]]
    assert adapter[2].approximate == "none"


@pytest.mark.parametrize("backend", ["sailyard_segments", "sdpa", "eager", FLASH])
@pytest.mark.parametrize("moe", [False, True])
def test_packed_rows_equal_samples_alone(backend, moe):
    model = network(moe)
    reference = network(moe)
    model.language_model.config._attn_implementation = backend
    encoded = samples()
    ids, segments, _, tiles = pack(encoded, sum(len(e.input_ids) for e in encoded) + 9)
    with torch.no_grad():
        for mask in (segments, block_mask(segments)):
            packed = model(ids, tiles, attention_mask=mask).logits
            start = 0
            for item in encoded:
                pixels = torch.from_numpy(item.pixel_values) if len(item.pixel_values) else None
                alone = reference(torch.from_numpy(item.input_ids)[None], pixels).logits
                end = start + len(item.input_ids)
                torch.testing.assert_close(packed[0, start:end], alone[0], atol=1e-4, rtol=0)
                start = end
            assert packed.isfinite().all()


def test_samples_in_several_rows_of_odd_lengths():
    model = network()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (2, 40), generator=generator)
    segments = torch.zeros(2, 40, dtype=torch.long)
    segments[0, :1], segments[0, 1:8], segments[0, 8:37] = 1, 2, 3
    segments[1, 5:22], segments[1, 22:24] = 1, 2  # padding in front as well
    with torch.no_grad():
        ours = model(ids, attention_mask=segments).logits
        model.language_model.set_attn_implementation("sdpa")
        theirs = model(ids, attention_mask=segments).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_masks_and_segments_say_the_same():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0, 5, 5, 5, 7, 7, 7]])
    mask = block_mask(segments)
    assert torch.equal(block_positions(segments_of(mask)), block_positions(segments))
    assert torch.equal(segments_of(mask) != 0, segments != 0)
    assert torch.equal(block_mask(segments_of(mask)), mask)
    assert mask.any(dim=-1).all()
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 1, 2]])
    assert torch.equal(block_positions(segments), expected)


@pytest.mark.parametrize("backend", ["sailyard_segments", "sdpa"])
def test_no_gradient_crosses_samples(backend):
    model = network().train()
    model.language_model.set_attn_implementation(backend)
    encoded = samples()
    ids, segments, labels, tiles = pack(encoded, 160)
    tiles = tiles.requires_grad_()
    labels[segments != 2] = -100  # loss of the second sample only; it owns tile 0
    model(ids, tiles, attention_mask=segments, labels=labels).loss.backward()
    assert tiles.grad[0].abs().max() > 0
    assert (tiles.grad[1:] == 0).all()


@pytest.mark.parametrize("backend", ["sailyard_segments", "sdpa", "eager", FLASH])
@pytest.mark.parametrize("moe", [False, True])
def test_no_gradient_crosses_tokens_of_samples(backend, moe):
    """Of words and visual tokens alike. The balance loss, which is of the batch, is left out."""
    model = network(moe).train()
    model.language_model.config._attn_implementation = backend
    ids, segments, labels, tiles = pack(samples(), 160)
    embeds = model.embed(ids, tiles).detach().requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=segments, labels=labels)
    out.loss_per_token[segments[out.label_rows, out.label_cols] == 3].sum().backward()
    assert embeds.grad[segments == 3].abs().amax(dim=-1).count_nonzero() > 10
    assert (embeds.grad[segments != 3] == 0).all()


@pytest.mark.parametrize("moe", [False, True])
def test_text_only_batches_touch_the_tower_times_zero(moe):
    model = network(moe).train()
    ids, segments, labels, tiles = pack(samples()[:1], 40)
    assert tiles is None
    model(ids, attention_mask=segments, labels=labels).loss.backward()
    for part in ("vision", "adapter"):
        for name, parameter in model.parts()[part].named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name
    assert any((p.grad != 0).any() for p in model.language_model.parameters())


def test_blank_tile_changes_no_logits():
    model = network()
    ids, segments, _, _ = pack(samples()[:1], 40)
    with torch.no_grad():
        still = model(ids, attention_mask=segments).logits
        assert torch.equal(model.train()(ids, attention_mask=segments).logits, still)


def test_loss_is_cross_entropy_at_labelled_places_only():
    model = network()
    ids, segments, labels, tiles = pack(samples(), 160)
    with torch.no_grad():
        out = model(ids, tiles, attention_mask=segments, labels=labels)
        logits = model(ids, tiles, attention_mask=segments).logits
    rows, cols = (labels != -100).nonzero(as_tuple=True)
    assert torch.equal(out.label_rows, rows)
    assert torch.equal(out.label_cols, cols)
    expected = F.cross_entropy(logits[rows, cols - 1], labels[rows, cols], reduction="none")
    torch.testing.assert_close(out.loss_per_token, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, expected.mean(), atol=1e-4, rtol=1e-4)
    assert out.logits is None


def test_a_batch_without_labels_has_zero_loss_and_gradients():
    model = network().train()
    ids, segments, labels, _ = pack(samples()[:1], 40)
    out = model(ids, attention_mask=segments, labels=torch.full_like(labels, -100))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert model.mlp1[1].weight.grad is not None
    assert (model.language_model.model.layers[0].mlp.up_proj.weight.grad == 0).all()


def test_left_padding_changes_nothing():
    model = network()
    item = samples()[1]
    ids, pixels = torch.from_numpy(item.input_ids)[None], torch.from_numpy(item.pixel_values)
    padded = F.pad(ids, (5, 0), value=processor().pad_token_id)
    mask = F.pad(torch.ones_like(ids), (5, 0))
    with torch.no_grad():
        alone = model(ids, pixels).logits
        shifted = model(padded, pixels, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(shifted, alone, atol=1e-4, rtol=0)


def test_image_order_follows_the_rows():
    model = network()
    encoded = samples()
    _, _, _, tiles = pack([encoded[1], encoded[2]], 120)
    first, second = (pack([e], 70)[0] for e in encoded[1:3])
    with torch.no_grad():
        both = model(torch.cat([first, second]), tiles).logits
        alone = model(second, torch.from_numpy(encoded[2].pixel_values)).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


def test_a_cut_image_is_refused():
    ids, _, _, tiles = pack([samples()[1]], 60)
    with pytest.raises(ValueError, match="cut inside"):
        network()(ids[:, :5], tiles)
    with pytest.raises(ValueError, match="left out"):
        network()(ids)
    with pytest.raises(ValueError, match="num_tiles, 3, 56, 56"):
        network()(ids, tiles[..., :42])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_separates_packed_samples():
    """Forward only, and without a compiler: PyTorch has no backward of it on CPUs."""
    model, reference = network(), network()
    model.set_attn_implementation("flex_attention")
    ids, segments, _, tiles = pack(samples(), 160)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        packed = model(ids, tiles, attention_mask=segments).logits
        expected = reference(ids, tiles, attention_mask=segments).logits
    real = segments[0] > 0
    assert model.vision_model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(packed[0, real], expected[0, real], atol=1e-4, rtol=0)


def test_packed_rows_need_a_backend_that_separates_them():
    model = network()
    model.language_model.config._attn_implementation = "paged_attention"
    ids, segments, _, tiles = pack(samples(), 160)
    with pytest.raises(ValueError, match="takes no packed rows"):
        model(ids, tiles, attention_mask=segments)


def test_a_cache_refuses_packed_rows():
    ids, segments, _, tiles = pack(samples(), 160)
    with pytest.raises(ValueError, match="one sample per row"):
        network()(ids, tiles, attention_mask=segments, use_cache=True)


def test_freezing_and_digests_prove_what_was_trained():
    model = network().train()
    before = part_digests(model)
    freeze_except(model, ["adapter"])
    ids, segments, labels, tiles = pack(samples(), 160)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, tiles, attention_mask=segments, labels=labels).loss.backward()
    optimizer.step()
    after = part_digests(model)
    assert {part for part in before if before[part] != after[part]} == {"adapter"}
    with pytest.raises(ValueError, match="unknown part 'vit'"):
        freeze_except(model, ["vit"])


def test_image_size_must_fit_the_merge():
    vision = vision_config().to_dict() | {"image_size": 70}
    with pytest.raises(ValueError, match="nearest that fits is 56"):
        SailVLConfig(vision_config=vision, text_config=language_config().to_dict())
