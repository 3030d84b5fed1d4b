"""The bootstrap tower's two heads: one knows the whole image, one a single visual token."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from training.tower import Tagger

WIDTH, SIDE, DOWNSAMPLE, NUM_TAGS = 8, 4, 2, 3


class Features(nn.Module):
    """A tower whose "pixels" are its patch features already."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, num_patches=SIDE * SIDE)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_one_head_names_tags_by_token_and_the_other_by_place() -> None:
    torch.manual_seed(0)
    tagger = Tagger(Features(), NUM_TAGS, DOWNSAMPLE)  # type: ignore[arg-type]
    nn.init.normal_(tagger.head.weight)
    nn.init.normal_(tagger.token_head.weight)
    grid = torch.randn(2, SIDE, SIDE, WIDTH)
    # Two visual tokens change places, each with its four patches.
    moved = grid.clone()
    moved[:, :2, :2], moved[:, 2:, 2:] = grid[:, 2:, 2:], grid[:, :2, :2]
    whole, tokens = tagger(grid.flatten(1, 2))
    moved_whole, moved_tokens = tagger(moved.flatten(1, 2))
    assert whole.shape == tokens.shape == (2, NUM_TAGS)
    torch.testing.assert_close(tokens, moved_tokens)
    assert (whole - moved_whole).abs().min() > 1e-3
    # Patches that swap between tokens are other tokens.
    torn = grid.clone()
    torn[:, 0, 1], torn[:, 0, 2] = grid[:, 0, 2], grid[:, 0, 1]
    assert (tagger(torn.flatten(1, 2))[1] - tokens).abs().min() > 1e-3
