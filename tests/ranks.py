"""Call a function on several ranks, each a process of its own, over gloo."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(function: Callable[[], Any], size: int, folder: Path) -> list[Any]:
    """What it returned, in order of rank; it must be importable by name."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(size, mp_context=spawn) as pool:
        waiting = [
            pool.submit(_on_rank, function, rank, size, str(folder / "ranks"))
            for rank in range(size)
        ]
        return [future.result() for future in waiting]


def _on_rank(function: Callable[[], Any], rank: int, size: int, store: str) -> Any:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = function()
        dist.barrier()  # or one that has finished would break another's exchange
        return result
    finally:
        dist.destroy_process_group()
