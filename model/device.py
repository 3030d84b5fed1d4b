"""Where a process computes."""

from __future__ import annotations

import torch


def own_device(local: int = 0) -> torch.device:
    """The GPU of this number on its machine, or the CPU where there is none."""
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
