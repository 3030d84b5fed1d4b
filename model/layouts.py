"""Names and shapes of the network's tensors on disk: our own layout and the released one.

A layout is a map from a name on disk to views of the network's memory, so the same map serves to
read, to write, to check a directory, and to count on the meta device.
"""

from __future__ import annotations

import re

import torch

from model.modeling import SailVLForConditionalGeneration
from model.shards import Pieces

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"

_TOWER = "vision_model"
# Ours to released, weight index of the released checkpoint.
_MODULES = {
    "embeddings.patch_embed": "preprocessor.patchifier.proj",
    "embeddings.rms_norm": "preprocessor.patchifier.norm",
    "rms_norm": "trunk.post_trunk_norm",
}
_BLOCK_MODULES = {
    "attention.out_proj": "attn.proj",
    "ffn.gate_proj": "mlp.fc1",
    "ffn.up_proj": "mlp.fc3",
    "ffn.down_proj": "mlp.fc2",
    "rms_norm1": "norm_1",
    "rms_norm2": "norm_2",
}
_POSITIONS = "embeddings.position_embedding.weight"
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.weight")


def native_views(model: SailVLForConditionalGeneration) -> dict[str, Pieces]:
    """Our layout, as `save_model` writes it: a tied head is left out, experts lie one by one."""
    views: dict[str, Pieces] = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.text_config.tie_word_embeddings:
            continue
        views |= _experts(name, tensor) if ".mlp.experts." in name else {name: (tensor,)}
    return views


def released_views(model: SailVLForConditionalGeneration) -> dict[str, Pieces]:
    """The layout of the released checkpoint.

    The tower has its own names and one fused matrix for queries, keys and values, in that order;
    the position table is [1, num_patches, width]; the head is stored even when it is tied. No
    checkpoint with experts was released: theirs are named as in public Qwen3-MoE checkpoints,
    under `language_model.` (our choice).
    """
    views: dict[str, Pieces] = {}
    for name, pieces in native_views(model).items():
        part, _, inner = name.partition(".")
        views |= _tower(inner, pieces, model) if part == _TOWER else {name: pieces}
    views[HEAD] = (model.get_parameter(HEAD).detach(),)
    return views


def _tower(inner: str, pieces: Pieces, model: SailVLForConditionalGeneration) -> dict[str, Pieces]:
    if inner == _POSITIONS:
        return {f"{_TOWER}.preprocessor.pos_embed": (pieces[0][None],)}
    block = _BLOCK.fullmatch(inner)
    if block is None:
        module, _, kind = inner.rpartition(".")
        return {f"{_TOWER}.{_MODULES[module]}.{kind}": pieces}
    number, module = block.groups()
    prefix = f"{_TOWER}.trunk.blocks.{number}"
    if module in _BLOCK_MODULES:
        return {f"{prefix}.{_BLOCK_MODULES[module]}.weight": pieces}
    attention = model.vision_model.encoder.layers[int(number)].attention
    fused = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {f"{prefix}.attn.qkv.weight": tuple(linear.weight.detach() for linear in fused)}


def _experts(name: str, tensor: torch.Tensor) -> dict[str, Pieces]:
    """In memory all experts of a layer are one tensor, gate above up: [E, 2 * inner, width]."""
    prefix, _, kind = name.rpartition(".")
    views: dict[str, Pieces] = {}
    for number, weight in enumerate(tensor):
        if kind == "down_proj":
            views[f"{prefix}.{number}.down_proj.weight"] = (weight,)
        else:
            gate, up = weight.chunk(2)
            views[f"{prefix}.{number}.gate_proj.weight"] = (gate,)
            views[f"{prefix}.{number}.up_proj.weight"] = (up,)
    return views
