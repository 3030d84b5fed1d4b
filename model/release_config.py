"""config.json in the form of the released checkpoint, both ways.

Every value is read from the file. The released configuration classes have other defaults than the
released file (select_layer -4, ps_version "v1", a Large tower), so a missing key is an error and
never a default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3Config, Qwen3MoeConfig

from model.config import LANGUAGE_TYPES, SailViTConfig, SailVLConfig
from model.shards import DTYPES, CheckpointError

Layout = Literal["released", "native"]

# Keys that both forms spell alike.
_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "rms_norm_eps",
)
_LANGUAGE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
# What this network has one form of.
_ONLY: dict[str, Any] = {
    "ps_version": "v2",
    "select_layer": -1,
    "vision_config.model_type": "sailvit",
    "vision_config.num_channels": 3,
    "vision_config.qkv_bias": False,
    "vision_config.use_bias": False,
    "llm_config.use_sliding_window": False,
}
# Released checkpoint, config.json: what describes its remote code and data, not its network.
_REMOTE: dict[str, Any] = {
    "architectures": ["SAILVLModel"],
    "model_type": "sailvl",
    "auto_map": {
        "AutoConfig": "configuration_sailvl.SAILVLConfig",
        "AutoModel": "modeling_sailvl.SAILVLModel",
        "AutoModelForCausalLM": "modeling_sailvl.SAILVLModel",
    },
    "dynamic_image_size": True,
    "pad2square": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "template": "univl-chat",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "vision_config": {
        "architectures": ["SAILViTModel"],
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
    },
    "llm_config": {"attn_implementation": "sdpa", "sliding_window": None, "max_window_layers": 28},
}
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def layout_of(body: dict[str, Any]) -> Layout:
    """Which of the two layouts a config.json describes; both say "sailvl".

    Raises:
        CheckpointError: another kind of model.
    """
    if body.get("model_type") != "sailvl":
        raise CheckpointError(
            f"config.json: model_type must be 'sailvl', found {body.get('model_type')!r}; a "
            f"language model or tower alone is named in a recipe's model section instead"
        )
    if "llm_config" in body:
        return "released"
    if "text_config" in body:
        return "native"
    raise CheckpointError(
        "config.json: llm_config (released layout) or text_config (native) is missing; take it "
        "from the checkpoint's own config.json"
    )


@contextmanager
def config_errors() -> Iterator[None]:
    """Errors that a value of config.json causes inside, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"config.json: {text}") from None


@config_errors()
def parse_config(body: dict[str, Any], image_token_id: int = 151671) -> SailVLConfig:
    """Our configuration of a released config.json.

    The whole file is kept as `config.released`, so that what the network does not read survives
    the way back.

    Args:
        body: the parsed file.
        image_token_id: of <IMG_CONTEXT>, which the file does not name; by default the released
            tokenizer's.

    Raises:
        CheckpointError: names the first key that is missing, or says what this network cannot do.
    """
    if layout_of(body) != "released":
        raise CheckpointError("config.json: llm_config is missing; this is our own layout")
    for path, only in _ONLY.items():
        found = required(body, path)
        if found != only:
            raise CheckpointError(
                f"config.json: {path} must be {only!r}, found {found!r}; this network has no other"
            )
    vision = SailViTConfig(**{key: required(body, f"vision_config.{key}") for key in _VISION})
    if required(body, "force_image_size") != vision.image_size:
        raise CheckpointError(
            f"config.json: force_image_size must be vision_config.image_size = "
            f"{vision.image_size}, found {body['force_image_size']!r}; positions are not resized"
        )
    return SailVLConfig(
        vision_config=vision.to_dict(),
        text_config=_parse_language(body).to_dict(),
        downsample=_downsample(required(body, "downsample_ratio")),
        image_token_id=image_token_id,
        released=body,
    )


def stored_dtype(body: dict[str, Any], key: str = "torch_dtype") -> torch.dtype:
    """The type of all tensors, by the config.json's `torch_dtype` (`dtype` in our own layout).

    Raises:
        CheckpointError: the key is missing, or names no floating type of ours.
    """
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    found = required(body, key)
    if found not in names:
        raise CheckpointError(
            f"config.json: {key} must be one of {', '.join(names)}, found {found!r}"
        )
    return names[found]


def released_body(config: SailVLConfig, dtype: torch.dtype, use_thumbnail: bool) -> dict[str, Any]:
    """config.json of a network of ours, in the released form.

    What the network was read from, if it was, with the network's own values over it.
    """
    text, vision = config.text_config, config.vision_config
    body = copy.deepcopy(getattr(config, "released", None) or _REMOTE)
    values = {
        **_ONLY,
        "downsample_ratio": 1 / config.downsample,
        "force_image_size": vision.image_size,
        "use_thumbnail": use_thumbnail,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{f"vision_config.{key}": getattr(vision, key) for key in _VISION},
        "llm_config.model_type": text.model_type,
        "llm_config.architectures": [_ARCHITECTURES[text.model_type]],
        **{f"llm_config.{key}": getattr(text, key) for key in _language_keys(text.model_type)},
        "llm_config.rope_theta": text.rope_parameters["rope_theta"],
    }
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        target = body[section] if section else body
        # An equal value is left as it was spelled: 1000000 does not become 1000000.0.
        if key not in target or target[key] != value:
            target[key] = value
    return body


def _parse_language(body: dict[str, Any]) -> Qwen3Config | Qwen3MoeConfig:
    model_type = required(body, "llm_config.model_type")
    if model_type not in LANGUAGE_TYPES:
        raise CheckpointError(
            f"config.json: llm_config.model_type must be {' or '.join(LANGUAGE_TYPES)}, found "
            f"{model_type!r}"
        )
    section = body["llm_config"]
    for key, plain in (
        ("rope_scaling", None),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
    ):
        if section.get(key, plain) != plain:
            raise CheckpointError(
                f"config.json: llm_config.{key} must be {plain!r} or left out, found "
                f"{section[key]!r}; this network has no other"
            )
    values = {key: required(body, f"llm_config.{key}") for key in _language_keys(model_type)}
    values["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": float(required(body, "llm_config.rope_theta")),
    }
    return Qwen3Config(**values) if model_type == "qwen3" else Qwen3MoeConfig(**values)


def _language_keys(model_type: str) -> tuple[str, ...]:
    return _LANGUAGE if model_type == "qwen3" else _LANGUAGE + _EXPERTS


def _downsample(ratio: Any) -> int:
    side = round(1 / ratio) if isinstance(ratio, (int, float)) and ratio > 0 else 0
    if side < 1 or ratio != 1 / side:
        raise CheckpointError(
            f"config.json: downsample_ratio must be 1 over a whole number, as 0.5, found {ratio!r}"
        )
    return side


def required(body: dict[str, Any], path: str, file: str = "config.json") -> Any:
    """The value at a dotted path.

    Raises:
        CheckpointError: names the path if there is none.
    """
    found: Any = body
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            raise CheckpointError(
                f"{file}: {path} is missing; take it from the checkpoint's own {file}, as "
                f"defaults may differ from it"
            )
        found = found[key]
    return found
