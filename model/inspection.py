"""What a checkpoint directory holds, told from its config and the headers of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.modeling import PARTS
from model.release import CONFIG, check_native, check_released
from model.release_config import layout_of
from model.shards import CheckpointError, StoredTensor, read_headers, read_object

_PREFIXES = dict(zip(PARTS, ("vision_model.", "mlp1.", "language_model."), strict=True))
_SHOWN = {
    "vision_config": ("image_size", "patch_size", "hidden_size", "num_hidden_layers"),
    "llm_config": ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; what could not be found out is empty.

    Attributes:
        layout: released | native | "".
        config: the sizes that tell one checkpoint from another, by section and key.
        dtypes: of the stored tensors, as "torch.bfloat16"; one in a sound checkpoint.
        num_files: safetensors files.
        num_tensors: tensors in them.
        values: stored numbers by part (vision, adapter, language) and `other`.
        problem: the first thing that keeps it from being loaded, with the way out; "" for none.
    """

    layout: str
    config: dict[str, dict[str, Any]]
    dtypes: tuple[str, ...]
    num_files: int
    num_tensors: int
    values: dict[str, int]
    problem: str


def inspect(directory: str | Path) -> Inspection:
    """Look a checkpoint of either layout over; no tensor is read but a tied released head.

    Broken checkpoints do not raise: what is wrong is the `problem`.
    """
    problem, layout = "", ""
    body: dict[str, Any] = {}
    stored: dict[str, StoredTensor] = {}
    try:
        body = read_object(Path(directory) / CONFIG)
        layout = layout_of(body)
    except CheckpointError as error:
        problem = str(error)
    try:
        stored = read_headers(directory)
        if layout:
            check_released(directory) if layout == "released" else check_native(directory)
    except CheckpointError as error:
        problem = problem or str(error)
    values = dict.fromkeys((*_PREFIXES, "other"), 0)
    for name, tensor in stored.items():
        part = next((p for p, prefix in _PREFIXES.items() if name.startswith(prefix)), "other")
        values[part] += tensor.num_values
    return Inspection(
        layout=layout,
        config=_summary(body, layout),
        dtypes=tuple(sorted({str(tensor.dtype) for tensor in stored.values()})),
        num_files=len({tensor.file for tensor in stored.values()}),
        num_tensors=len(stored),
        values=values,
        problem=problem,
    )


def _summary(body: dict[str, Any], layout: str) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    for section, keys in _SHOWN.items():
        ours = "text_config" if section == "llm_config" and layout == "native" else section
        found = body.get(ours)
        if isinstance(found, dict):
            summary[ours] = {key: found[key] for key in keys if key in found}
    return summary
