"""The images of a batch, as the network takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import torch

from model.processor import Encoded


class ImageInputs(TypedDict):
    """Keyword arguments of the network's forward pass and of `embed`.

    pixel_values: float32, tiles [N, 3, S, S] or, for images of any size, patches
        [P, 3 * p * p]; None when no conversation shows an image.
    image_grids: [N, 2] int64 for patches, otherwise None.
    """

    pixel_values: torch.Tensor | None
    image_grids: torch.Tensor | None


def image_inputs(encoded: Iterable[Encoded], device: torch.device | None = None) -> ImageInputs:
    """Join the images of conversations in their order; all must come from one processor."""
    seen = [item for item in encoded if len(item.pixel_values)]
    if not seen:
        return ImageInputs(pixel_values=None, image_grids=None)
    pixels = torch.from_numpy(np.concatenate([item.pixel_values for item in seen])).to(device)
    if seen[0].image_grids is None:
        return ImageInputs(pixel_values=pixels, image_grids=None)
    grids = np.concatenate([item.image_grids for item in seen if item.image_grids is not None])
    return ImageInputs(pixel_values=pixels, image_grids=torch.from_numpy(grids).to(device))
