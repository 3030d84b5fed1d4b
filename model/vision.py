"""SAIL-ViT: AIMv2 encoder blocks over square tiles."""

from __future__ import annotations

import torch
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

from model.config import SailViTConfig


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

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features after the final norm (released `select_layer` -1).

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
        for layer in self.encoder.layers:
            hidden = layer(hidden, None)
        features: torch.Tensor = self.rms_norm(hidden)
        return features
