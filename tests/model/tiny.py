"""The smallest networks and images that the tests of the model need."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AttentionInterface,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from model.checkpoint import build_model
from model.config import SailViTConfig
from model.modeling import SailVLForConditionalGeneration
from model.processor import Encoded, SailVLProcessor
from model.tokenizer import train_tokenizer

FLASH = "reference_flash"  # stands in for flash attention, which needs a GPU
SIZE = 56  # 4 x 4 patches, 4 tokens a tile
VOCAB = 400

TEXTS = ["how many circles are there?", "is the red square left of it? yes no", "one two three 123"]


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 4, 320)


def processor(max_tiles: int = 4, system_message: str = "") -> SailVLProcessor:
    return SailVLProcessor(
        tokenizer(), image_size=SIZE, max_tiles=max_tiles, system_message=system_message
    )


def language_config(moe: bool = False) -> Qwen3Config | Qwen3MoeConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # logits far apart: a wrong mask cannot hide in the tolerance
        "pad_token_id": tokenizer().pad_token_id,
        "eos_token_id": tokenizer().eos_token_id,
    }
    if not moe:
        return Qwen3Config(**shape)
    return Qwen3MoeConfig(
        **shape,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
    )


def vision_config() -> SailViTConfig:
    return SailViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        initializer_range=0.3,
    )


def network(moe: bool = False, seed: int = 0) -> SailVLForConditionalGeneration:
    torch.set_num_threads(1)
    image_token_id = processor().image_token_id
    model = build_model(
        vision_config(), language_config(moe), image_token_id=image_token_id, seed=seed
    )
    return model.eval()


def image(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples() -> list[Encoded]:
    """Text, one tile, a tiled picture with thumbnail, a two-frame video."""
    encode = processor().encode
    answer = {"role": "assistant", "content": "three"}
    picture = "<image>\nhow many circles are there?"
    frames = "Frame-1: <image>\nFrame-2: <image>\nis it red?"
    return [
        encode([{"role": "user", "content": "one two three"}, answer]),
        encode([{"role": "user", "content": picture}, answer], [image(1)]),
        encode([{"role": "user", "content": picture}, answer], [image(2, 120, 60)]),
        encode([{"role": "user", "content": frames}, answer], [image(3), image(4)], is_video=True),
    ]


def pack(
    encoded: list[Encoded], length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One row: ids [1, T], segment ids [1, T], labels [1, T], tiles."""
    ids = torch.full((1, length), processor().pad_token_id)
    segments = torch.zeros(1, length, dtype=torch.long)
    labels = torch.full((1, length), -100)
    start = 0
    for number, item in enumerate(encoded, start=1):
        span = slice(start, start + len(item.input_ids))
        ids[0, span] = torch.from_numpy(item.input_ids)
        segments[0, span] = number
        mask = torch.from_numpy(item.loss_mask)
        labels[0, span] = torch.where(mask, ids[0, span], -100)
        start = span.stop
    tiles = [item.pixel_values for item in encoded if len(item.pixel_values)]
    return ids, segments, labels, torch.from_numpy(np.concatenate(tiles)) if tiles else None


def reference_flash(module, query, key, value, mask, *, scaling, is_causal=None, **places):
    """Attention sample by sample, by the keywords that flash attention takes for packed rows."""
    ends = places["cu_seq_lens_q"]
    assert mask is None
    assert torch.equal(ends, places["cu_seq_lens_k"])
    assert places["max_length_q"] == places["max_length_k"] == int(ends.diff().max())
    causal = module.is_causal if is_causal is None else is_causal
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = [
        F.scaled_dot_product_attention(
            query[..., a:b, :],
            key[..., a:b, :],
            value[..., a:b, :],
            is_causal=causal,
            scale=scaling,
        )
        for a, b in pairwise(ends.tolist())
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(FLASH, reference_flash)
AttentionMaskInterface.register(FLASH, flash_attention_mask)
