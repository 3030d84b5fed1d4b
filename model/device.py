"""Where a process computes."""

from __future__ import annotations

import torch


def own_device(local: int = 0) -> torch.device:
    """The GPU of this number on its machine, or the CPU where there is none."""
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def inference_dtype() -> torch.dtype:
    """Of networks that only answer: bfloat16 on a GPU, which holds A3B so; float32 on the CPU."""
    return torch.float32 if own_device().type == "cpu" else torch.bfloat16
