"""The Triton kernels give what eager gives: on a GPU if there is one, else in Triton's interpreter.

The interpreter multiplies no bfloat16, so that half precision is float16 there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from model.experts import BACKEND, runs_on
from tests.model.experts_case import assert_same, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
running = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU; a process of its own interprets these"
)
# float32 is multiplied exactly by the interpreter, and on a GPU unless torch is told to use TF32.
SHAPES = [  # tokens, width, inner, experts, top_k, experts without tokens
    (33, 40, 24, 6, 2, 0),
    (33, 40, 24, 6, 2, 3),
    (5, 7, 3, 4, 1, 2),
    (37, 33, 17, 5, 3, 0),
    (50, 48, 20, 9, 8, 0),
    (1, 16, 16, 4, 4, 0),
    (70, 16, 16, 3, 1, 2),  # one expert gets everything, in several row tiles
]


@installed
@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
def test_kernels_in_the_interpreter():
    # Triton decides between device and interpreter when it is first imported.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout


@installed
@running
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_eager_forward_and_backward(shape):
    case = make_case(*shape[:5], idle=shape[5], device=DEVICE)
    assert runs_on(case.tokens) == "triton"
    assert_same(case.run(BACKEND), case.run("eager"), 1e-5)


@installed
@running
@pytest.mark.slow
def test_half_precision_is_as_near_to_the_truth_as_eager():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    half = make_case(40, 48, 32, 6, 3, dtype=dtype, device=DEVICE)
    exact = make_case(40, 48, 32, 6, 3, device=DEVICE)
    exact.experts.load_state_dict(half.experts.state_dict())
    exact.tokens, exact.weights, exact.grad = (
        x.float() for x in (half.tokens, half.weights, half.grad)
    )
    assert_same(half.run(BACKEND), exact.run("eager"), 1e-2)


@installed
@running
@pytest.mark.slow
def test_tokens_and_gradients_need_not_be_contiguous():
    case = make_case(20, 16, 24, 4, 2, device=DEVICE)
    case.tokens = torch.cat([case.tokens, case.tokens], dim=1)[:, ::2]
    case.grad = case.grad[:1].expand(20, 16)
    assert_same(case.run(BACKEND), case.run("eager"), 1e-5)


@installed
@running
@pytest.mark.slow
def test_same_input_same_bits():
    case = make_case(60, 48, 32, 6, 4, device=DEVICE)
    first, second = case.run(BACKEND), case.run(BACKEND)
    assert all(torch.equal(first[name], second[name]) for name in first)


@installed
@running
@pytest.mark.slow
def test_without_gradients_the_output_is_the_same():
    case = make_case(21, 24, 40, 5, 2, device=DEVICE)
    wanted = case.run(BACKEND)["output"]
    with torch.no_grad():
        assert torch.equal(case.experts(case.tokens, case.index, case.weights), wanted)


def _compile(name: str, constants: dict[str, int | bool | str]) -> list[tuple[int, str]]:
    """Shared memory in bytes and PTX of every tiling, for an H100, without one."""
    triton = pytest.importorskip("triton")
    from model import experts_kernels

    kernel = getattr(experts_kernels, name)
    names = kernel.fn.arg_names
    types = {"slot_ptr": "*i32", "offsets_ptr": "*i32", "num_slots": "i32", "rows_class": "i32"}
    types |= {"scale_ptr": "*fp32", "grad_weight_ptr": "*fp32"}
    found = []
    for config in kernel.configs:
        fixed = {k: v for k, v in (constants | config.kwargs).items() if k in names}
        source = triton.compiler.ASTSource(
            kernel.fn,
            {n: "constexpr" if n in fixed else types.get(n, "*bf16") for n in names},
            {(names.index(k),): v for k, v in fixed.items()},
            {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")},
        )
        compiled = triton.compile(
            source,
            target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        found.append((compiled.metadata.shared, compiled.asm["ptx"]))
    return found


A3B = {"TOP_K": 8, "EXPERTS": 128, "PADDED": 128, "WIDTH": 2048, "INNER": 768, "PRECISION": "ieee"}


@installed
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("up_kernel", {"KEEP": True}),
        ("rows_kernel", {"DEPTH": 768, "STRIDE_K": 1, "STRIDE_N": 768, "SCALE": True}),
        ("rows_kernel", {"DEPTH": 1536, "STRIDE_K": 2048, "STRIDE_N": 1, "SCALE": False}),
        ("grad_inner_kernel", {}),
        (
            "grad_weight_kernel",
            {"LEFT": 1536, "RIGHT": 2048, "LEFT_BY_TOKEN": False, "RIGHT_BY_TOKEN": True},
        ),
    ],
)
def test_every_tiling_compiles_for_an_h100_at_a3b_shapes(name, more):
    tilings = _compile(name, A3B | more)
    assert all(shared <= 227 * 1024 for shared, _ in tilings)
    # Tiles of 64 rows and more reach Hopper's own matrix instruction; loads run ahead of it.
    assert all("cp.async" in ptx for _, ptx in tilings)
    assert "wgmma" in tilings[-1][1]
