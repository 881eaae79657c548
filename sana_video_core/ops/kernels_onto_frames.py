"""The temporal convolution of ``kernels_onto.py`` for frames that come four at a time, in Gluon.

Import only where Triton has Gluon; called by ``onto_fused.py``. A tile holds the same places of four frames. Its three neighbours
in time are six frames, which are read once for all taps: what a product asks of the second-level cache shrinks by a sixth.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .kernels_onto import COLUMNS, DEPTH, LEFT, PARTS, ROWS, WANTED, WARPS, WIDTH, add, barrier, barriers, corner, fetch, place_of

TOGETHER, PLACES = gl.constexpr(4), gl.constexpr(32)  # frames of a tile, tokens of each
A_STAGES, B_STAGES = gl.constexpr(2), gl.constexpr(3)  # pieces of six frames and of one tap's weight that shared memory holds


@gluon.jit
def _ask(a, b, x, a_parts, b_parts, x_parts, a_ready, a_empty, b_ready, b_empty, x_ready, x_empty, extra, tiles, down, across,
         per, rows, whole, size, C: gl.constexpr, K: gl.constexpr, HAS_EXTRA: gl.constexpr):
    """Every piece into the place that is free next: of six frames once, of the weight for each tap."""
    STEPS: gl.constexpr = (K + DEPTH - 1) // DEPTH
    a_place, b_place, turn = 0, 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = place_of(tile, down, across)
        batch, first, outer, inner = corner(m, per, whole, size, TOGETHER)
        frame = batch * (whole // size + 2) + first // size
        for k in range(STEPS):
            slot = a_place % A_STAGES
            mbarrier.wait(a_empty.index(slot), (a_place // A_STAGES & 1) ^ 1)
            mbarrier.expect(a_ready.index(slot), (TOGETHER + 2) * PLACES * DEPTH)
            for f in gl.static_range(TOGETHER + 2):
                tma.async_copy_global_to_shared(a, [frame + f, inner, k * DEPTH], a_ready.index(slot),
                                                a_parts.index(slot * (TOGETHER + 2) + f))
            a_place += 1
            for tap in gl.static_range(3):
                into = b_place % B_STAGES
                mbarrier.wait(b_empty.index(into), (b_place // B_STAGES & 1) ^ 1)
                mbarrier.expect(b_ready.index(into), COLUMNS * DEPTH)
                tma.async_copy_global_to_shared(b, [n * COLUMNS, tap * K + k * DEPTH], b_ready.index(into), b_parts.index(into))
                b_place += 1
            if k == min(WANTED // 3, STEPS - 1):
                mbarrier.wait(x_empty.index(0), (turn & 1) ^ 1)
                mbarrier.expect(x_ready.index(0), ROWS * COLUMNS * 2)
                for j in gl.static_range(PARTS):
                    tma.async_copy_global_to_shared(x, [outer, inner, n * COLUMNS + j * WIDTH], x_ready.index(0),
                                                    x_parts.index(j))
                turn += 1
            if HAS_EXTRA and k < ROWS // 8:
                fetch(extra, m, n, k, per, rows, whole, size, C, TOGETHER)


@gluon.jit
def _multiply(a_parts, b_parts, x_parts, o_parts, a_ready, a_empty, b_ready, b_empty, x_ready, x_empty, x, out, extra, gate, bias,
              scale, factor, given, tiles, down, across, per, rows, whole, size, C: gl.constexpr, STEPS: gl.constexpr,
              HAS_EXTRA: gl.constexpr, HAS_GATE: gl.constexpr, HAS_BIAS: gl.constexpr, FP8: gl.constexpr):
    """Tiles of the product, and what becomes of them: a tap's frames lie a frame further in the same place."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 32])
    left: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    a_place, b_place, turn = 0, 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = place_of(tile, down, across)
        sums = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for k in range(STEPS):
            slot = a_place % A_STAGES
            mbarrier.wait(a_ready.index(slot), a_place // A_STAGES & 1)
            for tap in gl.static_range(3):
                into = b_place % B_STAGES
                mbarrier.wait(b_ready.index(into), b_place // B_STAGES & 1)
                frames = a_parts.index(slot * (TOGETHER + 2) + tap)._reinterpret(gl.float8e4nv, [ROWS, DEPTH], left)
                sums = warpgroup_mma(frames, b_parts.index(into).permute((1, 0)), sums, is_async=True)
                sums = warpgroup_mma_wait(1, deps=[sums])
                if (k > 0) | (tap > 0):  # the one before has been multiplied
                    mbarrier.arrive(b_empty.index((b_place - 1) % B_STAGES), count=1)
                if tap == 0 and k > 0:
                    mbarrier.arrive(a_empty.index((a_place - 1) % A_STAGES), count=1)
                b_place += 1
            a_place += 1
            if k == min(LEFT // 3, STEPS - 1) and turn > 0:
                tma.store_wait(0)
                barrier()
                mbarrier.arrive(x_empty.index(0), count=1)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(b_empty.index((b_place - 1) % B_STAGES), count=1)
        mbarrier.arrive(a_empty.index((a_place - 1) % A_STAGES), count=1)
        mbarrier.wait(x_ready.index(0), turn & 1)
        add(sums, m, n, x_parts, o_parts, x, out, extra, gate, bias, scale, factor, given, per, rows, whole, size, C, HAS_EXTRA,
             HAS_GATE, HAS_BIAS, False, FP8, TOGETHER)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "down", "across", "per", "rows", "whole", "size"])
def add_frames_kernel(
    a, b, x, out, extra, gate, bias, scale, factor, given, tiles, down, across, per, rows, whole, size, C: gl.constexpr,
    K: gl.constexpr, HAS_EXTRA: gl.constexpr, HAS_GATE: gl.constexpr, HAS_BIAS: gl.constexpr, FP8: gl.constexpr,
):
    """``add_product_kernel`` of TAPS = 3 for the first ``rows`` tokens of every batch row: frames in multiples of TOGETHER.

    ``a [frames and what stands between, S, K]``, ``x`` and ``out [frames, S, C]``, ``b [C, 3 K]``: descriptors.
    """
    a_parts = gl.allocate_shared_memory(a.dtype, [A_STAGES * (TOGETHER + 2), 1, PLACES, DEPTH], a.layout)
    b_parts = gl.allocate_shared_memory(b.dtype, [B_STAGES, COLUMNS, DEPTH], b.layout)
    x_parts = gl.allocate_shared_memory(x.dtype, [PARTS, TOGETHER, PLACES, WIDTH], x.layout)
    o_parts = x_parts
    if FP8:
        o_parts = gl.allocate_shared_memory(out.dtype, [2, TOGETHER, PLACES, WIDTH], out.layout)
    a_ready, a_empty = barriers(A_STAGES, 1)
    b_ready, b_empty = barriers(B_STAGES, 1)
    x_ready, x_empty = barriers(1, 1)
    fence_async_shared()
    STEPS: gl.constexpr = (K + DEPTH - 1) // DEPTH
    gl.warp_specialize([
        (_multiply, (a_parts, b_parts, x_parts, o_parts, a_ready, a_empty, b_ready, b_empty, x_ready, x_empty, x, out, extra,
                     gate, bias, scale, factor, given, tiles, down, across, per, rows, whole, size, C, STEPS, HAS_EXTRA, HAS_GATE,
                     HAS_BIAS, FP8)),
        (_ask, (a, b, x, a_parts, b_parts, x_parts, a_ready, a_empty, b_ready, b_empty, x_ready, x_empty, extra, tiles, down,
                across, per, rows, whole, size, C, K, HAS_EXTRA)),
    ], [1], [40])
