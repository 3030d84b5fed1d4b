"""From a recipe's shapes to modules: the one place that maps recipe fields to model configs."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3MoeConfig

from model.checkpoint import build_model
from model.config import SailViTConfig
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.vision import SailViT
from sailyard.recipe import ModelShape


def vision_config(shape: ModelShape) -> SailViTConfig:
    """SAIL-ViT of the recipe's `model.vision`."""
    vision = shape.vision
    return SailViTConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        rms_norm_eps=vision.rms_norm_eps,
    )


def language_config(
    shape: ModelShape, processor: SailVLProcessor
) -> Qwen3Config | Qwen3MoeConfig:
    """Qwen3 or Qwen3-MoE of the recipe's `model.language`, with the tokenizer's special ids."""
    language = shape.language
    common = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "intermediate_size": language.intermediate_size,
        "rope_theta": language.rope_theta,
        "max_position_embeddings": language.max_position_embeddings,
        "tie_word_embeddings": language.tie_word_embeddings,
        "rms_norm_eps": language.rms_norm_eps,
        "eos_token_id": processor.end_token_id,
        "pad_token_id": processor.pad_token_id,
        "bos_token_id": None,
    }
    moe = language.moe
    if moe is None:
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.expert_intermediate_size,
        router_aux_loss_coef=moe.aux_loss_coef,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def make_processor(tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> SailVLProcessor:
    """Chat format and tiling of a recipe around a tokenizer."""
    return SailVLProcessor(
        tokenizer,
        image_size=shape.vision.image_size,
        patch_size=shape.vision.patch_size,
        downsample=shape.downsample,
        max_tiles=shape.max_tiles,
        use_thumbnail=shape.use_thumbnail,
        system_message=shape.system_message,
    )


def assemble(
    shape: ModelShape,
    processor: SailVLProcessor,
    seed: int,
    *,
    vision: SailViT | None = None,
    language: PreTrainedModel | None = None,
) -> SailVLForConditionalGeneration:
    """Join tower and decoder by a fresh adapter; what is not given starts from random weights.

    Raises ValueError when a tokenizer has more entries than the embedding has rows.
    """
    num_rows = language.config.vocab_size if language else shape.language.vocab_size
    if len(processor.tokenizer) > num_rows:
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} entries, the embedding {num_rows} rows: "
            f"raise model.language.vocab_size"
        )
    moe = shape.language.moe
    return build_model(
        vision if vision is not None else vision_config(shape),
        language if language is not None else language_config(shape, processor),
        image_token_id=processor.image_token_id,
        downsample=shape.downsample,
        router_global_balance=moe.global_balance if moe else True,
        seed=seed % 2**31,
    )
