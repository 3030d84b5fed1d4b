"""Triton kernels of the fused experts: grouped GEMMs over slots sorted by expert.

Every program makes one tile of one expert and accumulates in float32. Row tiles are found inside
the kernel from the experts' offsets, so the launch grid is an upper bound known without asking the
device, and a program past the last tile ends at once. Tokens are gathered where they are read and
results scattered where they are written: no permuted copy of the tokens is made. Nothing is added
atomically, so the same input gives the same bits.

Names: x tokens, SLOTS = tokens * TOP_K, EXPERTS, WIDTH of the decoder, INNER of an expert.
`rows_class` (rows per expert, a power of two from 16 to 128) is there for the autotuner alone.

Tile sizes are our choice for an H100's 227 KB of shared memory and 256 KB of registers per
multiprocessor; the autotuner picks among them on the device at hand.
"""

import os

import triton
import triton.language as tl


def _config(m: int, n: int, k: int, stages: int, warps: int) -> triton.Config:
    return triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_stages=stages, num_warps=warps
    )


# Rows x columns x depth. Two accumulators (gate and up) make the columns of `up` count double.
_PAIR = [
    _config(16, 64, 128, 4, 4),
    _config(32, 64, 128, 3, 4),
    _config(64, 64, 64, 4, 4),
    _config(64, 128, 64, 3, 8),
    _config(128, 64, 64, 4, 8),
    _config(128, 128, 64, 3, 8),
]
_HEAVY = _PAIR[:-1]  # the epilogue of `grad_inner` spills registers at 128 x 128
_SINGLE = [
    _config(16, 128, 128, 4, 4),
    _config(32, 128, 128, 3, 4),
    _config(64, 128, 64, 4, 4),
    _config(64, 256, 64, 3, 8),
    _config(128, 128, 64, 4, 8),
    _config(128, 256, 64, 3, 8),
]
# Here M and N are the sides of a weight and K runs over the rows of an expert.
_WEIGHT = [
    _config(64, 128, 64, 4, 4),
    _config(128, 128, 32, 4, 4),
    _config(128, 128, 64, 3, 8),
    _config(128, 256, 64, 3, 8),
]
MIN_BLOCK_N = 64
if os.environ.get("TRITON_INTERPRET") == "1":  # no device to tune on, and small tests want edges
    _PAIR = _HEAVY = _SINGLE = _WEIGHT = [_config(16, 16, 16, 1, 1)]
    MIN_BLOCK_N = 16


def _fitting(configs, named_args, **_):
    """Row tiles that the experts can fill."""
    rows = named_args["rows_class"]
    return [c for c in configs if min(64, rows) <= c.kwargs["BLOCK_M"] <= rows] or configs[:1]


_PRUNE = {"early_config_prune": _fitting}


@triton.jit
def _find_tile(offsets_ptr, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """The expert of a row tile (EXPERTS or more past the last) and the tile's number inside it."""
    e = tl.arange(0, PADDED)
    begin = tl.load(offsets_ptr + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + BLOCK - 1) // BLOCK
    upto = tl.cumsum(tiles, 0)
    before = upto <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.sum(tl.where(before, tiles, 0), 0)


@triton.jit
def _inside(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Column numbers that may be read: those past the edge read column 0 and are never stored."""
    if SIZE % BLOCK == 0:
        return index
    return tl.where(index < SIZE, index, 0)


@triton.jit
def _load(ptrs, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile whose depth may end before the block does."""
    if SIZE % BLOCK == 0:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.autotune(_PAIR, key=["WIDTH", "INNER", "rows_class"], prune_configs_by=_PRUNE)
@triton.jit
def up_kernel(
    x_ptr,  # [tokens, WIDTH]
    weight_ptr,  # [EXPERTS, 2 * INNER, WIDTH]
    inner_ptr,  # out [SLOTS, INNER]
    gate_up_ptr,  # out [SLOTS, 2 * INNER], with KEEP
    slot_ptr,  # [SLOTS]
    offsets_ptr,  # [EXPERTS + 1]
    rows_class,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather, both projections at once, SwiGLU before anything is written."""
    num_n = tl.cdiv(INNER, BLOCK_N)
    tile_n = tl.program_id(0) % num_n  # an expert's tiles run side by side: its weights stay in L2
    expert, tile_m = _find_tile(offsets_ptr, tl.program_id(0) // num_n, EXPERTS, PADDED, BLOCK_M)
    if expert >= EXPERTS:
        return
    start = tl.load(offsets_ptr + expert) + tile_m * BLOCK_M
    place = start + tl.arange(0, BLOCK_M)
    real = place < tl.load(offsets_ptr + expert + 1)
    token = tl.load(slot_ptr + tl.where(real, place, start)) // TOP_K
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * WIDTH + depth[None, :]
    row = _inside(column, INNER, BLOCK_N)
    gate_ptrs = weight_ptr + expert.to(tl.int64) * (2 * INNER * WIDTH)
    gate_ptrs += row[None, :] * WIDTH + depth[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        left = depth + k < WIDTH
        x = _load(x_ptrs + k, left[None, :], WIDTH, BLOCK_K)
        w_gate = _load(gate_ptrs + k, left[:, None], WIDTH, BLOCK_K)
        w_up = _load(gate_ptrs + (INNER * WIDTH + k), left[:, None], WIDTH, BLOCK_K)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
    # Offsets inside a tile fit 32 bits; a tile of 64-bit pointers would take all registers.
    local = tl.arange(0, BLOCK_M)[:, None]
    store = real[:, None] & (column < INNER)[None, :]
    dtype = inner_ptr.dtype.element_ty
    inner = gate * tl.sigmoid(gate) * up
    inner_ptr += start.to(tl.int64) * INNER
    tl.store(inner_ptr + (local * INNER + column[None, :]), inner.to(dtype), mask=store)
    if KEEP:
        gate_up_ptr += start.to(tl.int64) * (2 * INNER)
        wide = local * (2 * INNER) + column[None, :]
        tl.store(gate_up_ptr + wide, gate.to(dtype), mask=store)
        tl.store(gate_up_ptr + (wide + INNER), up.to(dtype), mask=store)


@triton.autotune(_SINGLE, key=["DEPTH", "WIDTH", "STRIDE_K", "rows_class"], prune_configs_by=_PRUNE)
@triton.jit
def rows_kernel(
    a_ptr,  # [SLOTS, DEPTH], sorted
    b_ptr,  # [EXPERTS, ...]: element (k, n) of an expert at k * STRIDE_K + n * STRIDE_N
    out_ptr,  # out [SLOTS, WIDTH], in order of slot
    scale_ptr,  # [SLOTS] in order of slot, with SCALE
    slot_ptr,
    offsets_ptr,
    rows_class,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grouped GEMM whose rows go back to their slots, scaled by the router weight if asked."""
    num_n = tl.cdiv(WIDTH, BLOCK_N)
    tile_n = tl.program_id(0) % num_n
    expert, tile_m = _find_tile(offsets_ptr, tl.program_id(0) // num_n, EXPERTS, PADDED, BLOCK_M)
    if expert >= EXPERTS:
        return
    start = tl.load(offsets_ptr + expert) + tile_m * BLOCK_M
    place = start + tl.arange(0, BLOCK_M)
    real = place < tl.load(offsets_ptr + expert + 1)
    place = tl.where(real, place, start)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + place.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    b_ptrs = b_ptr + expert.to(tl.int64) * (DEPTH * WIDTH)
    b_ptrs += depth[:, None] * STRIDE_K + _inside(column, WIDTH, BLOCK_N)[None, :] * STRIDE_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        left = depth + k < DEPTH
        a = _load(a_ptrs + k, left[None, :], DEPTH, BLOCK_K)
        b = _load(b_ptrs + k * STRIDE_K, left[:, None], DEPTH, BLOCK_K)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    slot = tl.load(slot_ptr + place)
    if SCALE:
        total *= tl.load(scale_ptr + slot)[:, None]
    ptrs = out_ptr + slot.to(tl.int64)[:, None] * WIDTH + column[None, :]
    store = real[:, None] & (column < WIDTH)[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=store)


@triton.autotune(
    _HEAVY,
    key=["WIDTH", "INNER", "rows_class"],
    prune_configs_by=_PRUNE,
    reset_to_zero=["grad_weight_ptr"],  # tilings leave different numbers of partial sums
)
@triton.jit
def grad_inner_kernel(
    grad_ptr,  # [tokens, WIDTH]
    down_ptr,  # [EXPERTS, WIDTH, INNER]
    gate_up_ptr,  # [SLOTS, 2 * INNER]
    grad_gate_up_ptr,  # out [SLOTS, 2 * INNER]
    weighted_ptr,  # out [SLOTS, INNER]
    grad_weight_ptr,  # out [INNER tiles, SLOTS] in order of slot, partial sums
    scale_ptr,  # [SLOTS] in order of slot
    slot_ptr,
    offsets_ptr,
    num_slots,
    rows_class,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather, back through `down`, SwiGLU and the router weight in one epilogue."""
    num_n = tl.cdiv(INNER, BLOCK_N)
    tile_n = tl.program_id(0) % num_n
    expert, tile_m = _find_tile(offsets_ptr, tl.program_id(0) // num_n, EXPERTS, PADDED, BLOCK_M)
    if expert >= EXPERTS:
        return
    start = tl.load(offsets_ptr + expert) + tile_m * BLOCK_M
    place = start + tl.arange(0, BLOCK_M)
    real = place < tl.load(offsets_ptr + expert + 1)
    place = tl.where(real, place, start)
    slot = tl.load(slot_ptr + place)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = grad_ptr + (slot // TOP_K).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    b_ptrs = down_ptr + expert.to(tl.int64) * (WIDTH * INNER)
    b_ptrs += depth[:, None] * INNER + _inside(column, INNER, BLOCK_N)[None, :]
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        left = depth + k < WIDTH
        a = _load(a_ptrs + k, left[None, :], WIDTH, BLOCK_K)
        b = _load(b_ptrs + k * INNER, left[:, None], WIDTH, BLOCK_K)
        grad = tl.dot(a, b, grad, input_precision=PRECISION)
    local = tl.arange(0, BLOCK_M)[:, None]
    store = real[:, None] & (column < INNER)[None, :]
    wide = local * (2 * INNER) + column[None, :]
    gate_up_ptr += start.to(tl.int64) * (2 * INNER)
    gate = tl.load(gate_up_ptr + wide, mask=store, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (wide + INNER), mask=store, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    inner = silu * up
    partial = tl.sum(grad * inner, 1)  # columns past the edge have inner = 0
    tl.store(grad_weight_ptr + tile_n.to(tl.int64) * num_slots + slot, partial, mask=real)
    scale = tl.load(scale_ptr + slot)[:, None]
    grad *= scale
    dtype = weighted_ptr.dtype.element_ty
    weighted_ptr += start.to(tl.int64) * INNER
    weighted = (inner * scale).to(dtype)
    tl.store(weighted_ptr + (local * INNER + column[None, :]), weighted, mask=store)
    grad_gate_up_ptr += start.to(tl.int64) * (2 * INNER)
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_gate_up_ptr + wide, grad_gate.to(dtype), mask=store)
    tl.store(grad_gate_up_ptr + (wide + INNER), (grad * silu).to(dtype), mask=store)


@triton.autotune(_WEIGHT, key=["LEFT", "RIGHT", "LEFT_BY_TOKEN", "rows_class"])
@triton.jit
def grad_weight_kernel(
    left_ptr,  # [SLOTS, LEFT] sorted, or [tokens, LEFT]
    right_ptr,  # [SLOTS, RIGHT] sorted, or [tokens, RIGHT]
    out_ptr,  # out [EXPERTS, LEFT, RIGHT]
    slot_ptr,
    offsets_ptr,
    rows_class,
    TOP_K: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left_e^T @ right_e of one expert; zeros where an expert got no token."""
    num_n = tl.cdiv(RIGHT, BLOCK_N)
    num_tiles = tl.cdiv(LEFT, BLOCK_M) * num_n
    expert = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    row = (tile // num_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = _inside(row, LEFT, BLOCK_M)
    column_in = _inside(column, RIGHT, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        real = place < end
        left_at = place
        right_at = place
        if LEFT_BY_TOKEN:
            left_at = tl.load(slot_ptr + place, mask=real, other=0) // TOP_K
        if RIGHT_BY_TOKEN:
            right_at = tl.load(slot_ptr + place, mask=real, other=0) // TOP_K
        left_ptrs = left_ptr + left_at.to(tl.int64)[None, :] * LEFT + row_in[:, None]
        right_ptrs = right_ptr + right_at.to(tl.int64)[:, None] * RIGHT + column_in[None, :]
        left = tl.load(left_ptrs, mask=real[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=real[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    ptrs = out_ptr + expert.to(tl.int64) * (LEFT * RIGHT) + row[:, None] * RIGHT + column[None, :]
    store = (row < LEFT)[:, None] & (column < RIGHT)[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=store)


@triton.jit
def sum_slots_kernel(
    slots_ptr,  # [tokens * TOP_K, WIDTH]
    out_ptr,  # out [tokens, WIDTH]
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over each token's slots, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        ptrs = slots_ptr + (token * TOP_K + k) * WIDTH + column
        total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=inside)
