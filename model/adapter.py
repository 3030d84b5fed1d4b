"""The adapter: merge squares of patches into channels, then a two-layer MLP into the decoder.

Shape suffixes: N tiles, P patches of a tile, D width of the tower.
"""

from __future__ import annotations

import torch
from torch import nn


def merge_patches(features_NPD: torch.Tensor, downsample: int = 2) -> torch.Tensor:
    """Space to channel, in the order of the released `ps_version` "v2".

    Output cell (i, j) concatenates patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1); cells
    are row-major.

    Args:
        features_NPD: [num_tiles, grid * grid, width], patches row-major.
        downsample: side of the merged square, in patches.

    Returns:
        [num_tiles, (grid / downsample) ** 2, downsample ** 2 * width].
    """
    num_tiles, num_patches, width = features_NPD.shape
    grid = int(num_patches**0.5)
    cells = grid // downsample
    squares = features_NPD.view(num_tiles, cells, downsample, cells, downsample, width)
    squares = squares.transpose(2, 3)  # N, cell row, cell column, row in cell, column in cell, D
    return squares.reshape(num_tiles, cells * cells, downsample * downsample * width)


class Adapter(nn.Sequential):
    """LayerNorm, Linear, GELU (exact), Linear over merged patches, all with bias.

    A plain Sequential, so that its keys are the released `mlp1.0`, `mlp1.1` and `mlp1.3`.
    """

    def __init__(self, vision_width: int, language_width: int, downsample: int = 2) -> None:
        merged_width = vision_width * downsample * downsample
        super().__init__(
            nn.LayerNorm(merged_width),
            nn.Linear(merged_width, language_width),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )
        self.downsample = downsample

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Visual features to language tokens.

        Args:
            features: [num_tiles, num_patches, vision_width], patches row-major; or
                [num_patches, vision_width], images of any size in cell order.

        Returns:
            [num_tiles, num_cells, language_width], or [num_cells, language_width].
        """
        if features.ndim == 2:
            merged = features.reshape(-1, features.shape[-1] * self.downsample**2)
        else:
            merged = merge_patches(features, self.downsample)
        visual_tokens: torch.Tensor = super().forward(merged)
        return visual_tokens
