"""Configuration of the network: SAIL-ViT, adapter and Qwen3 decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3MoeConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig

LANGUAGE_TYPES = ("qwen3", "qwen3_moe")


class SailViTConfig(Aimv2VisionConfig):
    """AIMv2 encoder as SAIL-ViT uses it: no pooling head, learned positions.

    Defaults are SAIL-ViT-Huge of the released checkpoint: 1536 wide, 24 layers, 12 heads,
    448-pixel tiles cut into 14-pixel patches, so 1,024 patches per tile.

    Args:
        rope_2d: turn queries and keys by row and column as well (paper Figure 2 draws it, its text
            does not name it; spec A1). Off in the released checkpoint.
        rope_theta: base of that rotation, our choice.
    """

    model_type = "sailvit"
    base_config_key = "vision_config"

    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    image_size: int = 448
    patch_size: int = 14
    use_head: bool = False
    rope_2d: bool = False
    rope_theta: float = 10_000.0

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile, and of the position table."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per tile."""
        return self.grid_size**2


class SailVLConfig(PreTrainedConfig):
    """A SAIL-VL2 model: `vision_config`, `text_config` (Qwen3 or Qwen3-MoE) and what joins them.

    Args:
        vision_config: the encoder; SAIL-ViT-Huge when omitted.
        text_config: the decoder; any dict or config whose `model_type` is qwen3 or qwen3_moe.
        downsample: side of the square of patches merged into one language token (released
            `downsample_ratio` 0.5 = 2, in "v2" order).
        image_token_id: id of <IMG_CONTEXT>, whose positions take the visual tokens.
        router_global_balance: sum the routing statistics over all ranks before the balance
            loss is computed (paper section 2.2). Of no effect on a dense decoder.
        router_z_loss_coef: weight of the router z-loss, 0 for none.
    """

    model_type = "sailvl"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SailViTConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3"),
    }

    vision_config: Any = None  # a SailViTConfig once built
    text_config: Any = None  # a Qwen3Config or Qwen3MoeConfig once built
    downsample: int = 2
    image_token_id: int = 151671
    router_global_balance: bool = True
    router_z_loss_coef: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        vision = self.vision_config
        # The decoder decides; GenerationMixin and weight tying read the top level.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        if vision.image_size % vision.patch_size or self.grid_size % self.downsample:
            raise ValueError(
                f"image_size {vision.image_size} must be a multiple of patch_size x downsample = "
                f"{vision.patch_size} x {self.downsample}; the nearest that fits is "
                f"{self._nearest_image_size()}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return int(self.vision_config.grid_size)

    @property
    def tokens_per_tile(self) -> int:
        """Language tokens that one tile becomes (256 for the released 448-pixel tile)."""
        return (self.grid_size // self.downsample) ** 2

    @property
    def is_moe(self) -> bool:
        """Whether the decoder routes tokens to experts."""
        return self.text_config.model_type == "qwen3_moe"

    def _nearest_image_size(self) -> int:
        cell = self.vision_config.patch_size * self.downsample
        return max(1, round(self.vision_config.image_size / cell)) * cell


def vision_config_of(section: Any) -> SailViTConfig:
    """The tower's config from a recipe's `model.vision` section (read by attribute)."""
    return SailViTConfig(
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        image_size=section.image_size,
        patch_size=section.patch_size,
        rms_norm_eps=section.rms_norm_eps,
        rope_2d=section.rope_2d,
    )


def language_config_of(
    section: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> Qwen3Config | Qwen3MoeConfig:
    """The decoder's config from a recipe's `model.language` section (read by attribute).

    A section whose `moe` is not None gives Qwen3-MoE with every layer sparse and top-k weights
    that sum to 1, as in Qwen3-30B-A3B.

    Args:
        section: the sizes.
        tokenizer: gives the ids of padding and end; without one only the shape is meant.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer.
    """
    if tokenizer is not None and section.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.language.vocab_size {section.vocab_size} is smaller than the tokenizer's "
            f"{len(tokenizer)}; raise it to at least that"
        )
    shared = {
        "vocab_size": section.vocab_size,
        "hidden_size": section.hidden_size,
        "intermediate_size": section.intermediate_size,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_kv_heads,
        "head_dim": section.head_dim,
        "max_position_embeddings": section.max_position_embeddings,
        "rms_norm_eps": section.rms_norm_eps,
        # 0.02 is this at Qwen3's widths; at 128 it makes a network that barely starts to learn.
        "initializer_range": section.hidden_size**-0.5,
        "tie_word_embeddings": section.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(section.rope_theta)},
    }
    if tokenizer is not None:
        shared |= {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    moe = section.moe
    if moe is None:
        return Qwen3Config(**shared)
    return Qwen3MoeConfig(
        **shared,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.expert_intermediate_size,
        router_aux_loss_coef=moe.aux_loss_coef,
        norm_topk_prob=True,
    )


AutoConfig.register("sailvit", SailViTConfig, exist_ok=True)
AutoConfig.register("sailvl", SailVLConfig, exist_ok=True)
