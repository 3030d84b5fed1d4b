"""Accelerators that a plan can be made for: memory and peak rate, from data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

HEADROOM = 0.10
"""Share of a device's memory left to its context, communication buffers and fragmentation. Our
choice."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator.

    Attributes:
        memory_bytes: as sold (decimal gigabytes).
        peak_flops: dense bfloat16 per second, without sparsity.
    """

    name: str
    memory_bytes: int
    peak_flops: float

    @property
    def usable_bytes(self) -> int:
        """What a training process may count on."""
        return int(self.memory_bytes * (1 - HEADROOM))


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * 10**9, 312e12),
        Gpu("a100-40", 40 * 10**9, 312e12),
        Gpu("h20", 96 * 10**9, 148e12),
        Gpu("h100", 80 * 10**9, 989.4e12),
        Gpu("h200", 141 * 10**9, 989.4e12),
        Gpu("b200", 180 * 10**9, 2250e12),
    )
}
"""SXM variants. NVIDIA's data sheets; theirs with sparsity are twice these rates."""


def find_gpu(name: str) -> Gpu:
    """The accelerator of that name.

    Raises:
        ValueError: none; the message lists those that are known.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--gpu {name!r} is not known: {hint}use one of {', '.join(GPUS)}")
