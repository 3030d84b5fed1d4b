"""How fast a run goes, where its time goes, and how much of the hardware it uses."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from model.modeling import SailVLForConditionalGeneration
from sailyard.plan.flops import Cost
from sailyard.plan.hardware import GPUS
from sailyard.recipe import TrainRecipe
from training.balance import sample_cost
from training.stream import StreamBatch
from training.world import World


@dataclass(slots=True)
class _Window:
    """Sums since the last reading, over all ranks but for the seconds."""

    seconds: float = 0.0
    waited_s: float = 0.0
    tokens: int = 0
    slots: int = 0
    samples: int = 0
    images: int = 0
    flops: Cost = field(default_factory=lambda: Cost(0.0, 0.0))  # forward
    imbalance: float = 0.0
    steps: int = 0


class Meter:
    """Counts what steps hold and how long they take; `read` gives rates since the last call."""

    def __init__(
        self, model: SailVLForConditionalGeneration, recipe: TrainRecipe, world: World
    ) -> None:
        self._cost = sample_cost(model)
        self._seq_len, self._world = recipe.seq_len, world
        self._window = _Window()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        started = time.perf_counter()
        yield
        waited = time.perf_counter() - started
        self._window.waited_s += waited
        self._window.seconds += waited

    @contextmanager
    def stepping(self, batch: StreamBatch) -> Iterator[None]:
        """Around the step that trains on a global batch."""
        started = time.perf_counter()
        yield
        window = self._window
        window.seconds += time.perf_counter() - started
        window.steps += 1
        loads = [0.0] * self._world.size
        for number, row in enumerate(batch.rows):
            cost = sum((self._cost(encoded) for encoded in row), Cost(0.0, 0.0))
            loads[number * self._world.size // len(batch.rows)] += cost.total
            window.flops = window.flops + cost
            window.tokens += sum(len(encoded.input_ids) for encoded in row)
            window.samples += len(row)
            window.images += sum(
                len(e.pixel_values) if e.image_grids is None else len(e.image_grids) for e in row
            )
        window.slots += len(batch.rows) * self._seq_len
        window.imbalance += max(loads) / (sum(loads) / len(loads))

    def read(self) -> dict[str, float]:
        """Since the last reading: `*_per_second` over all ranks; `data_wait`, share of the time;
        `padding`, share of slots; `imbalance`, dearest rank over the mean; model TFLOP/s of all
        ranks, vision (with adapter) and language apart, a backward counted as two forwards;
        `memory_gb`, this rank's peak so far; `mfu`, share of the GPUs' dense bf16 peak, where that
        is known."""
        window, self._window = self._window, _Window()
        seconds = max(window.seconds, 1e-9)
        return {
            "tokens_per_second": window.tokens / seconds,
            "samples_per_second": window.samples / seconds,
            "images_per_second": window.images / seconds,
            "data_wait": window.waited_s / seconds,
            "padding": 1 - window.tokens / max(window.slots, 1),
            "imbalance": window.imbalance / max(window.steps, 1),
            "tflops_vision": 3 * window.flops.vision / seconds / 1e12,
            "tflops_language": 3 * window.flops.language / seconds / 1e12,
            "memory_gb": _peak_memory_gb(self._world.device),
            **self._mfu(3 * window.flops.total / seconds),
        }

    def _mfu(self, flops_per_second: float) -> dict[str, float]:
        if self._world.device.type != "cuda":
            return {}
        peak = peak_flops(torch.cuda.get_device_name(self._world.device))
        return {} if peak is None else {"mfu": flops_per_second / self._world.size / peak}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, None for one that is not listed."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu.peak_flops for name, gpu in GPUS.items() if name in words), None)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
