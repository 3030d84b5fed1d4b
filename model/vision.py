"""SAIL-ViT: AIMv2 encoder blocks over square tiles, or over images of any size (AnyRes).

Shape suffixes: N tiles or images, P patches (of one tile, or of all images together), D width,
H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.aimv2.modeling_aimv2 import (
    Aimv2Attention,
    Aimv2VisionModel,
    eager_attention_forward,
)
from transformers.models.llama.modeling_llama import rotate_half

from model.attention import SegmentLayout, attend, packed_layout, varlen
from model.config import SailViTConfig
from model.patches import cell_order

# These know nothing of packed rows; each group of equal images gets a call of its own instead.
_UNPACKED = ("sdpa", "eager")

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [P, d]


class SailViTAttention(Aimv2Attention):
    """AIMv2's attention, which also takes packed images and turns queries and keys by place."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        layout: SegmentLayout | None = None,
        rotation: Rotation | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[N, P, D] tiles, or [1, P, D] images end to end; every image sees itself alone.

        Args:
            lengths: [N] patches of each image of the one row.
            layout: the same for back ends that know nothing of packed rows.
            rotation: of queries and keys.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        if rotation is not None:
            query, key = _rotate(query, *rotation), _rotate(key, *rotation)
        backend = self.config._attn_implementation
        dropout = self.dropout if self.training else 0.0
        if layout is not None:
            out = attend(
                query,
                key,
                value,
                layout,
                causal=False,
                scaling=self.scale,
                dropout=dropout,
            )
        else:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
            out, _ = interface(
                self,
                query,
                key,
                value,
                attention_mask,
                is_causal=False,
                scaling=self.scale,
                dropout=dropout,
                **({} if lengths is None else varlen(lengths)),
            )
        return self.out_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


class SailViT(Aimv2VisionModel):
    """AIMv2 tower without a head: patch conv, RMSNorm, learned positions, pre-norm SwiGLU blocks.

    Loads AIMv2 checkpoints of the transformers layout as they are. The released SAIL-ViT names
    its modules differently, one to one: `preprocessor.patchifier.{proj,norm}` and `pos_embed` are
    `embeddings.{patch_embed,rms_norm,position_embedding}`; `trunk.blocks.N.{attn.qkv,attn.proj,
    mlp.fc1,mlp.fc3,mlp.fc2,norm_1,norm_2}` are `encoder.layers.N.{attention.{q,k,v}_proj,
    attention.out_proj,ffn.gate_proj,ffn.up_proj,ffn.down_proj,rms_norm1,rms_norm2}`;
    `trunk.post_trunk_norm` is `rms_norm`.
    """

    config_class = SailViTConfig
    config: SailViTConfig

    def __init__(self, config: SailViTConfig) -> None:
        super().__init__(config)
        for layer in self.encoder.layers:  # the same weights, another forward
            layer.attention.__class__ = SailViTAttention

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features of square tiles after the final norm (released `select_layer` -1).

        Args:
            pixel_values: [num_tiles, 3, image_size, image_size], normalised.

        Returns:
            [num_tiles, num_patches, hidden_size], patches row-major.

        Raises:
            ValueError: the tiles are not of the size the position table was made for.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values must be [num_tiles, 3, {size}, {size}], got "
                f"{list(pixel_values.shape)}; make them with this checkpoint's SailVLProcessor"
            )
        hidden = self.embeddings(pixel_values)
        side = self.config.grid_size
        return self._blocks(hidden, rotation=self._rotation([(side, side)], downsample=1))

    def encode_packed(
        self, patches: torch.Tensor, grids: torch.Tensor, downsample: int = 2
    ) -> torch.Tensor:
        """Patch features of images of any size, all in one call, none seeing another.

        The position table is interpolated to each image's grid (paper section 2.1.2; bicubic, in
        float32, averaged where the grid is coarser than the table: our choices, spec A1).

        Args:
            patches: [P, 3 * patch_size ** 2], image after image in cell order (`model.patches`).
            grids: [N, 2] int64, rows and columns of patches of each image.
            downsample: side of the merged square the cell order was made for, patches.

        Returns:
            [P, hidden_size], in the same order.

        Raises:
            ValueError: patches and grids do not match.
        """
        sizes = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        expected = (sum(rows * columns for rows, columns in sizes), 3 * self.config.patch_size**2)
        if tuple(patches.shape) != expected:
            raise ValueError(
                f"grids {sizes} need patches {list(expected)}, got {list(patches.shape)}; make "
                f"them with this checkpoint's SailVLProcessor"
            )
        embeddings = self.embeddings
        conv = embeddings.patch_embed
        hidden = F.linear(patches, conv.weight.flatten(1), conv.bias)
        hidden = embeddings.rms_norm(hidden) + self.positions(sizes, downsample).to(hidden.dtype)
        lengths = grids.to(patches.device).prod(dim=1)
        layout = packed_layout(lengths) if self.config._attn_implementation in _UNPACKED else None
        rotation = self._rotation(sizes, downsample)
        return self._blocks(hidden[None], lengths=lengths, layout=layout, rotation=rotation)[0]

    def _blocks(self, hidden: torch.Tensor, **places: Any) -> torch.Tensor:
        for layer in self.encoder.layers:
            hidden = layer(hidden, None, **places)
        features: torch.Tensor = self.rms_norm(hidden)
        return features

    def positions(self, sizes: list[tuple[int, int]], downsample: int) -> torch.Tensor:
        """The position table as each image's grid sees it: [P, D] float32, in cell order.

        Args:
            sizes: rows and columns of patches of each image.
            downsample: side of the merged square, patches.
        """
        table_PD = self.embeddings.position_embedding.weight.float()
        side, device = self.config.grid_size, table_PD.device
        table = table_PD.T.reshape(1, -1, side, side)
        made: dict[tuple[int, int], torch.Tensor] = {}
        for size in sizes:
            if size not in made:
                grid = table
                if size != (side, side):
                    grid = F.interpolate(table, size, mode="bicubic", antialias=True)
                made[size] = grid[0].flatten(1).T[_order(*size, downsample, device)]
        return torch.cat([made[size] for size in sizes])

    def _rotation(self, sizes: list[tuple[int, int]], downsample: int) -> Rotation | None:
        """2D RoPE of packed images, or of one grid that every tile has; None when switched off.

        Half of a head turns with the row, half with the column, both counted on the table's own
        grid: an image twice as fine has its patches half a step apart ("interpolate 2D RoPE",
        paper Figure 2).
        """
        if not self.config.rope_2d:
            return None
        table = self.embeddings.position_embedding.weight
        quarter = self.config.hidden_size // self.config.num_attention_heads // 4
        steps = torch.arange(quarter, dtype=torch.float32, device=table.device)
        rates = self.config.rope_theta ** (-steps / quarter)
        places = [_places(*size, downsample, self.config.grid_size) for size in sizes]
        places_P2 = torch.cat(places).to(table.device)
        angles = (places_P2[:, :, None] * rates).flatten(1).repeat(1, 2)
        return angles.cos().to(table.dtype), angles.sin().to(table.dtype)


def _rotate(x_NHPd: torch.Tensor, cos_Pd: torch.Tensor, sin_Pd: torch.Tensor) -> torch.Tensor:
    return x_NHPd * cos_Pd + rotate_half(x_NHPd) * sin_Pd


def _order(rows: int, columns: int, downsample: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(cell_order(rows, columns, downsample)).to(device)


def _places(rows: int, columns: int, downsample: int, side: int) -> torch.Tensor:
    """[rows * columns, 2] float32: centre of each patch, in steps of a side x side grid."""
    order = _order(rows, columns, downsample, torch.device("cpu"))
    grid = torch.stack((order // columns, order % columns), dim=1).float()
    return (grid + 0.5) * torch.tensor([side / rows, side / columns]) - 0.5
