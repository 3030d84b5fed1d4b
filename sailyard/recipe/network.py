"""The shape of the network: SAIL-ViT, the language model, and what joins them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from sailyard.recipe.base import Section

DEFAULT_SYSTEM_MESSAGE = (
    "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
)
"""Sent when a conversation has no system turn (released checkpoint; a format constant)."""


class VisionShape(Section):
    """SAIL-ViT. The defaults are the released Huge encoder's (released config)."""

    hidden_size: int = Field(1536, gt=0)
    """Width of a patch vector. Released config."""

    num_layers: int = Field(24, gt=0)
    """Transformer blocks. Released config."""

    num_heads: int = Field(12, gt=0)
    """Attention heads; must divide hidden_size. Released config."""

    intermediate_size: int = Field(4096, gt=0)
    """Width inside the SwiGLU feed-forward. Released config."""

    image_size: int = Field(448, gt=0)
    """Side of one square tile, pixels. Paper section 2.1.2."""

    patch_size: int = Field(14, gt=0)
    """Side of one patch, pixels; must divide image_size. Paper section 2.1.2."""

    rms_norm_eps: float = Field(1e-5, gt=0, lt=1)
    """Epsilon of RMSNorm. Released config."""

    rope_2d: bool = False
    """Turn queries and keys by row and column besides the position table; a head's width must then
    be a multiple of 4. Paper Figure 2 draws it, its text and the released tower have none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if self.rope_2d and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"rope_2d needs heads of a multiple of 4, hidden_size / num_heads is "
                f"{self.hidden_size // self.num_heads}; choose another num_heads"
            )
        return self


class MoEShape(Section):
    """Mixture of experts in every layer. The defaults are Qwen3-30B-A3B's (public config)."""

    num_experts: int = Field(128, ge=2)
    """Experts per layer. Public config of Qwen3-30B-A3B."""

    top_k: int = Field(8, ge=1)
    """Experts a token visits; at most num_experts. Public config of Qwen3-30B-A3B."""

    expert_intermediate_size: int = Field(768, gt=0)
    """Width inside one expert's feed-forward. Public config of Qwen3-30B-A3B."""

    aux_loss_coef: float = Field(0.001, ge=0, le=1)
    """Weight of the load-balancing loss. The paper is silent; Qwen3's own value."""

    z_loss_coef: float = Field(0.0, ge=0, le=1)
    """Weight of the router z-loss, which keeps the routers' logits small; 0 for none. The paper
    names none; ST-MoE used 0.001."""

    global_balance: bool = True
    """Average the activation statistics across ranks before the loss. Paper section 2.2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        return self


class LanguageShape(Section):
    """The decoder. The defaults are Qwen3-1.7B's, the 2B model's language part."""

    hidden_size: int = Field(2048, gt=0)
    """Width of a token vector. Released config."""

    num_layers: int = Field(28, gt=0)
    """Decoder layers. Released config."""

    num_heads: int = Field(16, gt=0)
    """Query heads; a multiple of num_kv_heads. Released config."""

    num_kv_heads: int = Field(8, gt=0)
    """Key and value heads. Released config."""

    head_dim: int = Field(128, gt=0, multiple_of=2)
    """Width of one head; even, for rotary positions. Released config."""

    intermediate_size: int = Field(6144, gt=0)
    """Width inside the SwiGLU feed-forward of a dense layer. Released config."""

    vocab_size: int = Field(151_936, ge=300)
    """Rows of the token embedding: 256 bytes, the special tokens and the merges. Released
    config."""

    rope_theta: float = Field(1_000_000.0, gt=1)
    """Base of the rotary position frequencies. Released config."""

    max_position_embeddings: int = Field(40_960, gt=0)
    """Longest sequence, tokens. Released config."""

    tie_word_embeddings: bool = True
    """Share the embedding with the output layer: true up to 1.7B, false for 8B and A3B. Public
    Qwen3 configs."""

    rms_norm_eps: float = Field(1e-6, gt=0, lt=1)
    """Epsilon of RMSNorm. Released config."""

    moe: MoEShape | None = None
    """Experts, or null for a dense model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        return self


class ModelShape(Section):
    """The whole network and how an image becomes tokens."""

    vision: VisionShape = VisionShape()
    """The vision encoder."""

    language: LanguageShape = LanguageShape()
    """The language model."""

    max_tiles: int = Field(10, ge=1, le=64)
    """Most tiles of one image, thumbnail not counted. Released preprocessor (its config says
    12, evaluations use 10 to 24)."""

    use_thumbnail: bool = True
    """Add the whole image as a last tile when there are several. Released config."""

    downsample: int = Field(2, ge=1, le=8)
    """Patches merged per side into one token: 2 makes 1024 patches 256 tokens. Paper section
    2.1.2."""

    any_resolution: bool = False
    """Encode an image at its own size instead of in tiles. Paper section 2.1.2, the AnyRes
    model."""

    max_patches: int = Field(16_384, ge=1)
    """Most patches of one image when any_resolution is on: 16384 = 1792 x 1792 pixels. Paper
    section 6.1, whose "input length" we read as patches."""

    system_message: str = DEFAULT_SYSTEM_MESSAGE
    """System turn of conversations that have none; empty for no system turn. Released
    template."""

    pretrained_language: str | None = "Qwen/Qwen3-1.7B"
    """Hugging Face id or folder of the language model; null trains a small one in
    bootstrap.language. Paper Table 1."""

    pretrained_vision: str | None = "apple/aimv2-huge-patch14-448"
    """Hugging Face id or folder of the vision encoder; null trains a small one in
    bootstrap.vision. Paper section 2.1.2 (AIMv2)."""

    @property
    def tokens_per_tile(self) -> int:
        """Language tokens that one tile becomes."""
        return (self.vision.image_size // self.vision.patch_size // self.downsample) ** 2

    @property
    def max_image_tokens(self) -> int:
        """Most language tokens that one image becomes, its two border tokens included."""
        if self.any_resolution:
            return self.max_patches // self.downsample**2 + 2
        thumbnail = 1 if self.use_thumbnail and self.max_tiles > 1 else 0
        return (self.max_tiles + thumbnail) * self.tokens_per_tile + 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        side = self.vision.patch_size * self.downsample
        if self.vision.image_size % side:
            raise ValueError(
                f"vision.patch_size x downsample = {side} does not divide vision.image_size "
                f"{self.vision.image_size}"
            )
        return self
