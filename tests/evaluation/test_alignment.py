"""Distances with known answers, and the measurement on a real (random, tiny) network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.alignment import (
    TooFewTokens,
    alignment_distances,
    cloud_distances,
    exact_wasserstein,
    mean_overall_distance,
    nearest_neighbour_distance,
    pca,
    sliced_wasserstein,
    unit_rms,
)
from model.modeling import part_digests
from sailyard.media import decode_image
from tests.evaluation.tiny import captions, tiny_model


def cloud(seed: int, num: int = 200, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, width))


def test_nearest_neighbour_runs_from_visual_to_text() -> None:
    visual = np.array([[0.0, 0.0], [3.0, 4.0]])
    text = np.array([[0.0, 0.0], [100.0, 100.0]])
    assert nearest_neighbour_distance(visual, text) == pytest.approx(2.5)
    assert nearest_neighbour_distance(text, visual) > 60


def test_mean_overall_distance() -> None:
    assert mean_overall_distance(np.zeros((1, 2)), np.array([[3.0, 4.0], [0.0, 1.0]])) == 3.0


def test_wasserstein_of_a_shifted_cloud_is_the_shift() -> None:
    points = cloud(0)
    shift = np.array([3.0, 0.0, 0.0, 4.0, 0.0, 0.0])
    rng = np.random.default_rng(0)
    assert exact_wasserstein(points, points + shift, rng) == pytest.approx(5.0, rel=1e-6)
    assert exact_wasserstein(points, points, rng) == pytest.approx(0.0, abs=1e-9)


def test_sliced_wasserstein_agrees_with_theory() -> None:
    points = cloud(1, width=2)
    shift = np.array([1.0, 0.0])
    # The mean of |cos| over directions in the plane is 2 / pi.
    value = sliced_wasserstein(points, points + shift, 4000, np.random.default_rng(0))
    assert value == pytest.approx(2 / np.pi, rel=0.03)


def test_pca_keeps_the_widest_axes_and_their_distances() -> None:
    points = cloud(2) * np.array([10.0, 5.0, 0.01, 0.01, 0.01, 0.01])
    flat = pca(points, 2)
    assert flat.shape == (200, 2)
    assert flat[:, 0].std() > flat[:, 1].std() > 4
    full = np.linalg.norm(points[0] - points[1])
    assert np.linalg.norm(flat[0] - flat[1]) == pytest.approx(full, rel=0.01)
    with pytest.raises(TooFewTokens):
        pca(points[:1], 2)


def test_unit_rms_removes_scale() -> None:
    points = cloud(3)
    np.testing.assert_allclose(unit_rms(points), unit_rms(points * 7.0), rtol=1e-6)


def test_closer_clouds_measure_closer_and_the_seed_repeats() -> None:
    text = cloud(4)
    near, far = cloud(5) + 0.5, cloud(5) + 2.0
    closer, further = cloud_distances(near, text, seed=3), cloud_distances(far, text, seed=3)
    assert all(closer[name] < further[name] for name in closer)
    assert closer == cloud_distances(near, text, seed=3)


def test_measured_on_a_network_the_numbers_repeat() -> None:
    torch.set_num_threads(1)
    model, processor = tiny_model()
    images = [decode_image(sample.images[0]) for sample in captions(8)]
    before = part_digests(model)
    found = alignment_distances(model, processor, images, 100, seed=1, projections=8)
    assert found == alignment_distances(model, processor, images, 100, seed=1, projections=8)
    assert part_digests(model) == before
    assert {"adapter", "adapter_unit", "adapter_pca", "vit_pca"} <= found.keys()
    assert found["num_images"] == 8
    assert found["num_text_rows"] == 100
    assert found["num_visual_tokens"] == 8 * processor.tokens_per_tile


def test_visual_tokens_made_of_text_rows_are_at_distance_zero() -> None:
    """An adapter whose bias is an embedding row puts every visual token on the text cloud."""
    torch.set_num_threads(1)
    model, processor = tiny_model()
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        model.mlp1[3].weight.zero_()
        model.mlp1[3].bias.copy_(rows[5])
    images = [decode_image(sample.images[0]) for sample in captions(5)]
    found = alignment_distances(model, processor, images, len(rows), seed=0, projections=8)
    assert found["adapter"]["nearest_neighbour"] == pytest.approx(0.0, abs=1e-5)
    assert found["adapter"]["wasserstein"] > 0.0
