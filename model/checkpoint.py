"""Checkpoints in and out: whole models, towers and language models, safetensors only.

Shape suffixes: V vocabulary, D decoder width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging as hf_logging

from model.adapter import Adapter
from model.attention import BACKEND
from model.chat import IMG_CONTEXT
from model.config import (
    LANGUAGE_TYPES,
    SailViTConfig,
    SailVLConfig,
    language_config_of,
    vision_config_of,
)
from model.experts import choose_experts
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.shards import CheckpointError, read_headers
from model.tokenizer import is_hub_id, load_tokenizer
from model.vision import SailViT

SHARD_SIZE = "4GB"
# Packed rows are cheap in the decoder's own backend; everything else is plain sdpa.
ATTENTION = {"": "sdpa", "vision_config": "sdpa", "text_config": BACKEND}


def build_language(config: Qwen3Config | Qwen3MoeConfig, seed: int = 0) -> PreTrainedModel:
    """A decoder with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model_type == "qwen3_moe":
            config._experts_implementation = choose_experts()
        return AutoModelForCausalLM.from_config(config, attn_implementation=BACKEND)


def build_vision(config: SailViTConfig, seed: int = 0) -> SailViT:
    """A tower with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SailViT._from_config(config, attn_implementation="sdpa")


def build_model(
    vision: SailViT | SailViTConfig,
    language: PreTrainedModel | Qwen3Config | Qwen3MoeConfig,
    *,
    image_token_id: int,
    downsample: int = 2,
    router_global_balance: bool = True,
    router_z_loss_coef: float = 0.0,
    seed: int = 0,
) -> SailVLForConditionalGeneration:
    """Join a tower and a decoder with a fresh adapter.

    Trained modules are taken over as they are (not copied); configs give random weights. The
    adapter depends on the seed only.

    Args:
        vision: tower or its config.
        language: Qwen3 or Qwen3-MoE causal language model, or its config.
        image_token_id: id of `<IMG_CONTEXT>` (`SailVLProcessor.image_token_id`).
        downsample: side of the merged square, patches.
        router_global_balance, router_z_loss_coef: see `SailVLConfig`.
        seed: of the random weights.

    Raises:
        CheckpointError: the decoder is no Qwen3.
    """
    vision_config = vision.config if isinstance(vision, PreTrainedModel) else vision
    text_config = language.config if isinstance(language, PreTrainedModel) else language
    _check_language(text_config.model_type, "the decoder given")
    config = SailVLConfig(
        vision_config=_portable(vision_config),
        text_config=_portable(text_config),
        image_token_id=image_token_id,
        downsample=downsample,
        router_global_balance=router_global_balance,
        router_z_loss_coef=router_z_loss_coef,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SailVLForConditionalGeneration._from_config(config, attn_implementation=ATTENTION)
    if isinstance(vision, PreTrainedModel):
        model.vision_model.load_state_dict(vision.state_dict())
    if isinstance(language, PreTrainedModel):
        model.language_model.load_state_dict(language.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start_adapter(model.mlp1, model.get_input_embeddings().weight)
    return model


def _portable(config: PreTrainedConfig) -> dict[str, Any]:
    """A config without the place it was read from: the same checkpoint anywhere is the same."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def build_from_recipe(
    section: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision: SailViT | None = None,
    language: PreTrainedModel | None = None,
    seed: int = 0,
) -> SailVLForConditionalGeneration:
    """The network of a recipe's `model` section (read by attribute).

    Args:
        section: with `vision`, `language`, `downsample`.
        tokenizer: of the language model; must know `<IMG_CONTEXT>`.
        vision, language: trained parts; random ones of the section's shape when omitted.
        seed: of everything random.
    """
    moe = section.language.moe
    model = build_model(
        vision if vision is not None else vision_config_of(section.vision),
        language if language is not None else language_config_of(section.language, tokenizer),
        image_token_id=tokenizer.get_vocab()[IMG_CONTEXT],
        downsample=section.downsample,
        router_global_balance=moe is None or moe.global_balance,
        router_z_loss_coef=0.0 if moe is None else moe.z_loss_coef,
        seed=seed,
    )
    if language is None:
        silence_branches(model.language_model)
    return model


# Root mean square of GELU(x) for x of a standard normal distribution.
GELU_RMS = 0.652


@torch.no_grad()
def start_adapter(adapter: Adapter, words_VD: torch.Tensor) -> None:
    """Draw a fresh adapter's weights so that its visual tokens are as long as the decoder's words.

    Our choice; the paper says "random". With visual tokens seven times as long, a frozen decoder of
    `tiny` stood at a loss of 0.30 after 120 steps of lookups, so at 0.20 (docs/log.md).
    """
    layers = [module for module in adapter if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.weight.normal_(std=layer.in_features**-0.5)
    layers[-1].weight.mul_(words_VD.std() / GELU_RMS)


@torch.no_grad()
def silence_branches(language: PreTrainedModel) -> None:
    """Zero what every attention and MLP branch adds to the residual stream of a fresh decoder.

    Embeddings then reach the last layer undisturbed, and a branch speaks once it has something to
    say. Our choice: with random branches a 4-layer decoder had not learnt in 400 steps to look up
    what lies at a named place, with silent ones it had in 200 (docs/log.md).
    """
    for name, parameter in language.named_parameters():
        if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            parameter.zero_()


def save_model(
    directory: str | Path, model: SailVLForConditionalGeneration, processor: SailVLProcessor
) -> None:
    """Write config, weights, tokenizer and processor; equal models give equal bytes."""
    _save(directory, model)
    processor.save_pretrained(directory)


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """Read what `save_model` wrote; the model comes in eval mode.

    Raises:
        CheckpointError: no config, a different kind of model, or a tensor that is missing, of
            another shape, without a place, or cut off; the first is named.
        ProcessorError, TokenizerError: the processor's files are missing.
    """
    _check_type(directory, ("sailvl",))
    model = _read(
        SailVLForConditionalGeneration, directory, dtype=dtype, attn_implementation=ATTENTION
    )
    return model, SailVLProcessor.from_pretrained(directory)


def save_vision(directory: str | Path, vision: SailViT) -> None:
    """Write a tower alone."""
    _save(directory, vision)


def load_vision(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> SailViT:
    """Read a tower: a directory or Hugging Face id of ours or of AIMv2 in transformers' layout.

    Raises:
        CheckpointError: a different kind of model, or a tensor at fault, as in `load_model`.
    """
    _check_type(name_or_path, ("sailvit", "aimv2_vision_model"))
    return _read(
        SailViT,
        name_or_path,
        left_out="head.",  # AIMv2's pooling head is not part of SAIL-ViT
        dtype=dtype,
        attn_implementation="sdpa",
        use_head=False,
    )


def save_language(
    directory: str | Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a decoder with its tokenizer, as any Qwen3 checkpoint."""
    _save(directory, language)
    tokenizer.save_pretrained(directory)


def load_language(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a Qwen3 or Qwen3-MoE causal language model and its tokenizer.

    The tokenizer gets the released visual tokens if it lacks them.

    Args:
        name_or_path: directory or Hugging Face id.
        dtype: of the weights in memory.

    Raises:
        CheckpointError: a different kind of model, or a tensor at fault, as in `load_model`.
        TokenizerError: no tokenizer, or not Qwen's.
    """
    _check_type(name_or_path, LANGUAGE_TYPES)
    language = _read(AutoModelForCausalLM, name_or_path, dtype=dtype, attn_implementation=BACKEND)
    if language.config.model_type == "qwen3_moe":
        language.set_experts_implementation(choose_experts())
    tokenizer = load_tokenizer(name_or_path)
    if len(tokenizer) > language.config.vocab_size:
        raise CheckpointError(
            f"{name_or_path} has {language.config.vocab_size} embedding rows for "
            f"{len(tokenizer)} tokens, the visual ones included; train it with a larger vocab_size"
        )
    return language, tokenizer


def _save(directory: str | Path, model: PreTrainedModel) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


def _read(kind: Any, name_or_path: str | Path, left_out: str = "-", **settings: Any) -> Any:
    """`from_pretrained`, which would fill a missing tensor with random numbers, as an error.

    Args:
        kind: class to load.
        left_out: beginning of the names of stored tensors that are not wanted.
    """
    if Path(name_or_path).is_dir():
        read_headers(name_or_path)  # a file that was cut off is told with the tensor's name
    with _quiet():
        model, found = kind.from_pretrained(
            name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    faults = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    faults += [
        f"{name}: expected {list(expected)}, found {list(stored)}"
        for name, stored, expected in sorted(found["mismatched_keys"])
    ]
    faults += [
        f"{name} has no place in this network"
        for name in sorted(found["unexpected_keys"])
        if not name.startswith(left_out)
    ]
    if faults:
        raise CheckpointError(
            f"{name_or_path}: {faults[0]}; take config.json and the weights from the same "
            f"checkpoint"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar in a log file, where each of its steps would be a line."""
    was_on = hf_logging.is_progress_bar_enabled()
    if was_on and not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def _check_type(name_or_path: str | Path, expected: tuple[str, ...]) -> None:
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} holds no config.json; is it a checkpoint directory?")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    elif is_hub_id(name_or_path):
        config, _ = PreTrainedConfig.get_config_dict(str(name_or_path))
    else:
        raise CheckpointError(f"there is no directory {path}; give one, or a Hugging Face id")
    found = config.get("model_type")
    if found not in expected:
        raise CheckpointError(
            f"{name_or_path} holds a {found!r} model where {' or '.join(expected)} is needed"
        )
    if "llm_config" in config:  # both layouts say "sailvl"
        raise CheckpointError(
            f"{name_or_path} is in the released layout; bring it into ours first: sailyard model "
            f"convert {name_or_path} NEW_DIRECTORY --to native"
        )


def _check_language(model_type: str, what: str) -> None:
    if model_type not in LANGUAGE_TYPES:
        raise CheckpointError(f"{what} is {model_type!r}; use {' or '.join(LANGUAGE_TYPES)}")
