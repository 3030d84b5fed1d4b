"""One layer of experts, forward and backward: eager, torch's grouped GEMM, and ours.

The layer is A3B's (D 2048, 128 experts of 768, top-8) unless memory forbids: then the experts are
halved until four copies of the weights fit (weights, gradients, and what eager's backward pass
makes beside them), and the result says so. Tokens choose experts at random. The three take turns;
what counts is the median of the ratios of one turn. Results are compared before anything is timed.

On a GPU the layer is in bfloat16 and the roofline is the larger of two times: counted FLOPs (three
matrix products per slot and direction) over the datasheet's dense bfloat16 peak, and the weights
read twice and their gradients written once over its bandwidth. No GPU has run this yet.

    python -m benchmarks.moe --json
    python -m benchmarks.moe --json --experts 32 --tokens 256     # a CPU with less patience
    python -m benchmarks.moe --json --device cuda --tokens 8192   # needs Triton, which torch's CUDA
                                                                  # build brings along
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from model.experts import BACKEND, BACKENDS, runs_on

GPU_COMMAND = "python -m benchmarks.moe --json --device cuda --tokens 8192"
# Dense bfloat16 TFLOP/s and TB/s of memory, from NVIDIA's datasheets (SXM parts).
DATASHEET = {"H200": (989.4, 4.8), "H100": (989.4, 3.35), "A100": (312.0, 2.039)}


@dataclass(frozen=True)
class Shape:
    """A layer of experts; defaults are A3B's (public config of Qwen3-30B-A3B)."""

    tokens: int = 512
    width: int = 2048
    experts: int = 128
    inner: int = 768
    top_k: int = 8

    @property
    def weights(self) -> int:
        """Parameters of the layer."""
        return 3 * self.experts * self.inner * self.width

    @property
    def flops(self) -> int:
        """Of forward and backward: 2 per multiply-add, and backward is twice forward."""
        return 3 * 2 * self.tokens * self.top_k * 3 * self.inner * self.width


def shrink(shape: Shape, free_bytes: float, bytes_per_value: int) -> Shape:
    """The shape with experts halved until four copies of the weights fit."""
    while 4 * shape.weights * bytes_per_value > free_bytes and shape.experts > 2 * shape.top_k:
        shape = Shape(**{**asdict(shape), "experts": shape.experts // 2})
    return shape


class Layer:
    """A layer with its tokens; `run` is one forward and backward."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.inner,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        self.experts.to_empty(device=device).to(dtype)
        for parameter in self.experts.parameters():
            parameter.data = normal(*parameter.shape).mul_(parameter.shape[-1] ** -0.5)
        self.tokens = normal(shape.tokens, shape.width).requires_grad_()
        logits = torch.randn(shape.tokens, shape.experts, generator=generator, device=device)
        weights, self.index = logits.softmax(-1).topk(shape.top_k)
        self.weights = weights.to(dtype).requires_grad_()
        self.grad = normal(shape.tokens, shape.width)
        self.on_gpu = device == "cuda"

    def run(self, backend: str) -> float:
        """Seconds of a forward and backward pass, the device's queue emptied around it."""
        self.experts.config._experts_implementation = backend
        for leaf in self._leaves():
            leaf.grad = None
        if self.on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.out = self.experts(self.tokens, self.index, self.weights)
        self.out.backward(self.grad)
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def results(self) -> list[torch.Tensor]:
        """Output and gradients of the last run."""
        return [self.out.detach(), *(leaf.grad for leaf in self._leaves() if leaf.grad is not None)]

    def _leaves(self) -> list[torch.Tensor]:
        return [self.tokens, self.weights, *self.experts.parameters()]


def differences(layer: Layer) -> dict[str, float]:
    """Largest difference to eager of output and gradients, over the norm; warms up as well."""
    layer.run("eager")
    wanted = layer.results()
    found = {}
    for backend in BACKENDS[1:]:
        layer.run(backend)
        pairs = zip(layer.results(), wanted, strict=True)
        found[backend] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return found


def measure(layer: Layer, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each back end, and how many times as long as ours the others take."""
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(repeats):
        for backend, times in seconds.items():
            times.append(layer.run(backend))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds[BACKEND], strict=True))
        for name, times in seconds.items()
        if name != BACKEND
    }
    return {name: statistics.median(times) for name, times in seconds.items()}, ratios


def roofline(shape: Shape, seconds: dict[str, float], name: str) -> dict[str, Any] | None:
    """What the datasheet allows, or None for a device that is not in the table."""
    known = next((figures for model, figures in DATASHEET.items() if model in name), None)
    if known is None:
        return None
    compute = shape.flops / (known[0] * 1e12)
    memory = 3 * 2 * shape.weights / (known[1] * 1e12)
    return {
        "seconds_of_flops": compute,
        "seconds_of_memory": memory,
        "share_of_peak_flops": {name: compute / s for name, s in seconds.items()},
        "share_of_roofline": {name: max(compute, memory) / s for name, s in seconds.items()},
    }


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured."""
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    asked = Shape(args.tokens, args.width, args.experts, args.inner, args.top_k)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if on_gpu else pages
    shape = shrink(asked, free, dtype.itemsize)
    layer = Layer(shape, args.device, dtype, args.seed)
    agreement = differences(layer)
    seconds, ratios = measure(layer, args.repeats)
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    a3b = Shape(tokens=shape.tokens)
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": asdict(shape),
        "shape_is": "A3B's layer" if shape == a3b else "scaled: not A3B's layer",
        "ours_runs_on": runs_on(layer.tokens),
        "median_seconds": seconds,
        "ours_is_faster_by": ratios,
        "tflops": {name: shape.flops / s / 1e12 for name, s in seconds.items()},
        "roofline": roofline(shape, seconds, device) if on_gpu else None,
        "largest_difference_to_eager": agreement,
        "on_a_gpu": None if on_gpu else GPU_COMMAND,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    result = report(args := parser.parse_args(argv))
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{result['shape_is']} on {result['device']}: {result['shape']}")
    for name, seconds in result["median_seconds"].items():
        faster = result["ours_is_faster_by"].get(name)
        print(f"{name:14} {seconds:8.3f} s" + (f"  ours is {faster:.2f}x" if faster else ""))
    if result["on_a_gpu"]:
        print(f"on a GPU: {result['on_a_gpu']}")


if __name__ == "__main__":
    main()
