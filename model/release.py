"""Checkpoints in the layout that SAIL-VL2's authors released, and the way there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from model.checkpoint import ATTENTION, load_model, save_model
from model.config import SailVLConfig
from model.counting import empty_model
from model.layouts import EMBEDDING, HEAD, native_views, released_views
from model.modeling import SailVLForConditionalGeneration
from model.processor import PROCESSOR_FILE, SailVLProcessor
from model.release_config import (
    Layout,
    config_errors,
    layout_of,
    parse_config,
    released_body,
    required,
    stored_dtype,
)
from model.shards import (
    SHARD_BYTES,
    CheckpointError,
    check_tensors,
    read_headers,
    read_object,
    read_tensor,
    read_tensors,
    write_tensors,
)
from model.tiling import IMAGENET_MEAN, IMAGENET_STD
from model.tokenizer import load_tokenizer

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"


def load_released(
    directory: str | Path,
) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """Read a checkpoint in the released layout; the model keeps its type and is in eval mode.

    Every name, shape and type is checked before a tensor is read, and tensors are copied one at a
    time into the network: memory holds the weights once.

    Args:
        directory: config.json, safetensors, the tokenizer's files and preprocessor_config.json.

    Raises:
        CheckpointError: names the first config key or tensor that is missing or does not fit.
        TokenizerError: the tokenizer's files are missing.
    """
    directory = Path(directory)
    dtype = check_released(directory)
    body = read_object(directory / CONFIG)
    config = parse_config(body)
    processor = _load_processor(directory, config, body)
    config.image_token_id = processor.image_token_id
    # Nothing is drawn, as all is overwritten. Not the meta device: rotary tables are computed.
    with no_init_weights():
        model = SailVLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=ATTENTION
        )
    model.tie_weights()
    views = released_views(model)
    if config.text_config.tie_word_embeddings:
        del views[HEAD]  # the embedding's own memory
    read_tensors(views, read_headers(directory))
    return model.eval(), processor


def save_released(
    directory: str | Path,
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a network of ours in the released layout.

    The remote code that `auto_map` names is its authors' and is not written. config.json comes
    last: a directory whose writing was cut short is no checkpoint. The processor's own file lies
    beside the released ones, which have no place for the system message.

    Args:
        directory: is made.
        model: all tensors of one type.
        processor: of the model.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        CheckpointError: tensors of several types, or a tower with 2D RoPE, for which the layout has
            no word.
    """
    if model.config.vision_config.rope_2d:
        raise CheckpointError(
            "the released layout has no word for vision_config.rope_2d, and its readers would "
            "leave it out; keep the native layout"
        )
    views = released_views(model)
    for name, pieces in views.items():
        if pieces[0].dtype != model.dtype:
            raise CheckpointError(
                f"{name} is {pieces[0].dtype} and the model {model.dtype}; bring the model to one "
                f"type first, as model.to(torch.bfloat16)"
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, views, shard_bytes)
    processor.save_pretrained(directory)
    _write_json(directory / PREPROCESSOR, _preprocessor_body(processor))
    body = released_body(model.config, model.dtype, processor.use_thumbnail)
    _write_json(directory / CONFIG, body)


def convert(source: str | Path, target: str | Path, layout: Layout) -> None:
    """Write a checkpoint of the one layout in the other; tensors keep their bytes and type.

    Raises:
        CheckpointError: the source is broken, foreign or in that layout already, or the target
            holds something.
        ProcessorError, TokenizerError: files of the processor are missing.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is not an empty directory; name a new one")
    if layout_of(read_object(Path(source) / CONFIG)) == layout:
        raise CheckpointError(f"{source} is in the {layout} layout already")
    if layout == "native":
        save_model(target, *load_released(source))
    else:
        save_released(target, *load_model(source, check_native(source)))


def check_released(directory: str | Path) -> torch.dtype:
    """The type of a checkpoint in the released layout, checked as `load_released` needs it.

    Raises:
        CheckpointError: names the first config key or tensor that is missing or does not fit.
    """
    body = read_object(Path(directory) / CONFIG)
    config, dtype = parse_config(body), stored_dtype(body)
    stored = read_headers(directory)
    check_tensors(released_views(empty_model(config)), stored, dtype)
    if config.text_config.tie_word_embeddings:
        head, embedding = (read_tensor(stored, name) for name in (HEAD, EMBEDDING))
        if not torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
            raise CheckpointError(
                f"{HEAD} and {EMBEDDING} differ, though config.json says that they are tied; set "
                f"llm_config.tie_word_embeddings to false to keep both"
            )
    return dtype


def check_native(directory: str | Path) -> torch.dtype:
    """The type of a checkpoint of ours, whose tensors are checked by name, shape and type.

    `load_model` finds the same out while it reads; this reads no tensor.

    Raises:
        CheckpointError: names the first tensor that is missing or does not fit.
    """
    body = read_object(Path(directory) / CONFIG)
    dtype = stored_dtype(body, "dtype")
    with config_errors():
        model = empty_model(SailVLConfig.from_dict(body))
    check_tensors(native_views(model), read_headers(directory), dtype)
    return dtype


def _load_processor(directory: Path, config: SailVLConfig, body: dict[str, Any]) -> SailVLProcessor:
    if (directory / PROCESSOR_FILE).is_file():
        return SailVLProcessor.from_pretrained(directory)
    settings = read_object(directory / PREPROCESSOR)
    return SailVLProcessor(
        load_tokenizer(directory),
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        downsample=config.downsample,
        # Released: 10. The key of the same name in config.json, 12, is not what tiles are cut by.
        max_tiles=required(settings, "max_dynamic_patch", PREPROCESSOR),
        use_thumbnail=required(body, "use_thumbnail"),
    )


def _preprocessor_body(processor: SailVLProcessor) -> dict[str, Any]:
    """Keys of the released checkpoint's preprocessor_config.json."""
    return {
        "image_size": processor.image_size,
        "patch_size": processor.patch_size,
        "image_mean": IMAGENET_MEAN.astype(float).round(3).tolist(),
        "image_std": IMAGENET_STD.astype(float).round(3).tolist(),
        "max_dynamic_patch": processor.max_tiles,
        "use_msac": processor.msac,
        "pad_input": True,
    }


def _write_json(file: Path, body: dict[str, Any]) -> None:
    text = json.dumps(body, ensure_ascii=False, indent=2)
    file.write_text(text + "\n", encoding="utf-8")
