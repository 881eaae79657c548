"""A product of E4M3 matrices that ends by adding itself to the tokens, in Gluon: Triton's language for one kind of card, Hopper.

Import only where Triton has Gluon; called by ``onto_fused.py``. Triton's own products lost about what the passes over memory cost
(CHANGELOG). Here one warp does nothing but ask for what comes next, tiles ahead, and eight multiply and add; what a tile is added
to waits in shared memory, and what was added leaves from there while the next one is multiplied. Sums are float32, in an order
that depends on shapes alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name up to Triton 3.6 and after

# A tile of the result, and how much of the inner width is multiplied at a time. Smaller tiles were slower: each asks the
# second-level cache for more operands a product.
ROWS, COLUMNS, DEPTH = gl.constexpr(128), gl.constexpr(256), gl.constexpr(128)
STAGES = gl.constexpr(3)  # pieces of both operands that shared memory holds, beside a tile of x
GROUP = gl.constexpr(16)  # tiles below each other that are made at the same time, so that they share what the cache holds
PARTS = gl.constexpr(4)  # of a tile's columns, one after the other, when it is added
WIDTH = gl.constexpr(64)  # columns of a part
WARPS = gl.constexpr(8)  # that multiply
# The piece with which the tile before has left shared memory, and the one after which what a tile is added to is asked for.
LEFT, WANTED = gl.constexpr(3), gl.constexpr(6)


@gluon.jit
def barriers(COUNT: gl.constexpr, EMPTIED: gl.constexpr):
    """Barriers of COUNT places: (that one is ready, that EMPTIED have done with it)."""
    ready = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=EMPTIED)
    return ready, empty


@gluon.jit
def place_of(tile, down, across):
    """(row, column) of a tile."""
    first = tile // (GROUP * across) * GROUP
    size = gl.minimum(down - first, GROUP)
    inner = tile % (GROUP * across)
    return first + inner % size, inner // size


@gluon.jit
def corner(m, per, whole, size, FRAMES: gl.constexpr):
    """(batch row, its first token, and where in x that is) of tile m: ROWS tokens, or of FRAMES frames as many each."""
    batch = m // per
    if FRAMES == 1:
        first = m % per * ROWS
        return batch, first, batch, first
    across = (size + ROWS // FRAMES - 1) // (ROWS // FRAMES)
    frame, place = m % per // across * FRAMES, m % per % across * (ROWS // FRAMES)
    return batch, frame * size + place, batch * (whole // size) + frame, place


@gluon.jit
def _token(r, first, inner, rows, size, FRAMES: gl.constexpr):
    """The token of a tile's row r, and whether there is one."""
    if FRAMES == 1:
        return first + r, first + r < rows
    place = r % (ROWS // FRAMES)
    return first + r // (ROWS // FRAMES) * size + place, inner + place < size


@gluon.jit
def fetch(x, m, n, step, per, rows, whole, size, C: gl.constexpr, FRAMES: gl.constexpr):
    """Eight rows of a tile of x, all but its end, into the second-level cache."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    batch, first, _, inner = corner(m, per, whole, size, FRAMES)
    token, _ = _token(step * 8 + lane // 4, first, inner, rows, size, FRAMES)
    column = gl.minimum(n * COLUMNS + lane % 4 * (COLUMNS // 4), C - 1)
    at = x + (batch * whole + gl.minimum(token, rows - 1)).to(gl.int64) * C + column
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _ask(a, b, x, a_parts, b_parts, x_parts, ready, empty, x_ready, x_empty, extra, tiles, down, across, per, rows, whole, size,
         stride, C: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, HAS_EXTRA: gl.constexpr):
    """Every piece of both operands into the place that is free next, and what the tile is added to."""
    STEPS: gl.constexpr = (K + DEPTH - 1) // DEPTH
    LAST: gl.constexpr = TAPS * STEPS - 1
    place, turn = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = place_of(tile, down, across)
        row = m // per * stride + m % per * ROWS
        for tap in gl.static_range(TAPS):
            for k in range(STEPS):
                slot = place % STAGES
                mbarrier.wait(empty.index(slot), (place // STAGES & 1) ^ 1)
                mbarrier.expect(ready.index(slot), (ROWS + COLUMNS) * DEPTH)
                # Beyond the last channel there are zeros in a, so it does not matter what b has there.
                tma.async_copy_global_to_shared(a, [row + tap * size, k * DEPTH], ready.index(slot), a_parts.index(slot))
                tma.async_copy_global_to_shared(b, [n * COLUMNS, tap * K + k * DEPTH], ready.index(slot), b_parts.index(slot))
                place += 1
                if tap * STEPS + k == min(WANTED, LAST):
                    mbarrier.wait(x_empty.index(0), (turn & 1) ^ 1)
                    mbarrier.expect(x_ready.index(0), ROWS * COLUMNS * 2)
                    for j in gl.static_range(PARTS):
                        tma.async_copy_global_to_shared(x, [m // per, m % per * ROWS, n * COLUMNS + j * WIDTH], x_ready.index(0),
                                                        x_parts.index(j))
                    turn += 1
                if HAS_EXTRA and tap * STEPS + k < ROWS // 8:
                    fetch(extra, m, n, tap * STEPS + k, per, rows, whole, size, C, 1)


@gluon.jit
def _multiply(a_parts, b_parts, x_parts, o_parts, ready, empty, x_ready, x_empty, x, out, extra, gate, bias, scale, factor,
              given, tiles, down, across, per, rows, whole, size, C: gl.constexpr, TOTAL: gl.constexpr, HAS_EXTRA: gl.constexpr,
              HAS_GATE: gl.constexpr, HAS_BIAS: gl.constexpr, BY_ROW: gl.constexpr, FP8: gl.constexpr):
    """Tiles of the product out of TOTAL pieces each, and what becomes of them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 32])
    place, turn = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = place_of(tile, down, across)
        sums = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for k in range(TOTAL):
            slot = place % STAGES
            mbarrier.wait(ready.index(slot), place // STAGES & 1)
            sums = warpgroup_mma(a_parts.index(slot), b_parts.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            if k > 0:  # the one before has been multiplied
                mbarrier.arrive(empty.index((place - 1) % STAGES), count=1)
            place += 1
            if k == min(LEFT, TOTAL - 1) and turn > 0:
                tma.store_wait(0)
                barrier()
                mbarrier.arrive(x_empty.index(0), count=1)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index((place - 1) % STAGES), count=1)
        mbarrier.wait(x_ready.index(0), turn & 1)
        add(sums, m, n, x_parts, o_parts, x, out, extra, gate, bias, scale, factor, given, per, rows, whole, size, C, HAS_EXTRA,
            HAS_GATE, HAS_BIAS, BY_ROW, FP8, 1)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _part(sums, j: gl.constexpr):
    """Columns ``j`` of PARTS; every thread has some of each."""
    half = sums.reshape((ROWS, 2, COLUMNS // 2)).permute(0, 2, 1).split()[j // 2]
    return half.reshape((ROWS, 2, COLUMNS // 4)).permute(0, 2, 1).split()[j % 2]


@gluon.jit
def add(sums, m, n, x_parts, o_parts, x, out, extra, gate, bias, scale, factor, given, per, rows, whole, size, C: gl.constexpr,
         HAS_EXTRA: gl.constexpr, HAS_GATE: gl.constexpr, HAS_BIAS: gl.constexpr, BY_ROW: gl.constexpr, FP8: gl.constexpr,
         FRAMES: gl.constexpr):
    """``x += gate * (factor * scale * sums + bias + extra)``, and the same over ``given`` into ``out`` (FP8)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 32])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    batch, first, outer, inner = corner(m, per, whole, size, FRAMES)
    times, inverse = gl.load(scale), 1.0 / gl.load(given)
    if BY_ROW:
        token = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        times_row = (gl.load(factor + batch * rows + token, mask=token < rows, other=0.0) * times)[:, None]
    else:
        times *= gl.load(factor)
    if HAS_EXTRA:
        r = gl.arange(0, ROWS, gl.SliceLayout(1, flat))
        token, here = _token(r, first, inner, rows, size, FRAMES)
        start = (batch * whole + token).to(gl.int64) * C
    for j in gl.static_range(PARTS):
        if FP8 and j > 1:  # the place of two parts before is free again
            tma.store_wait(2)
            barrier()
        column = n * COLUMNS + j * WIDTH
        c = column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        real = c < C
        place = x_parts.index(j).reshape((ROWS, WIDTH))
        value, more = gl.convert_layout(_part(sums, j), layout), place.load(layout).to(gl.float32)
        gain = gl.full((WIDTH,), 1.0, gl.float32, gl.SliceLayout(0, layout))
        if HAS_GATE:
            gain = gl.load(gate + batch * C + c, mask=real, other=0.0).to(gl.float32)
        if HAS_BIAS:
            more += (gain * gl.load(bias + c, mask=real, other=0.0).to(gl.float32))[None, :]
        if HAS_EXTRA:
            d = column + gl.arange(0, WIDTH, gl.SliceLayout(0, flat))
            u = gl.load(extra + start[:, None] + d[None, :], mask=here[:, None] & (d < C)[None, :], other=0.0)
            more += gain[None, :] * gl.convert_layout(u, layout).to(gl.float32)
        value = value * times_row * gain[None, :] + more if BY_ROW else value * (gain * times)[None, :] + more
        place.store(value.to(gl.bfloat16))
        if FP8:
            o_parts.index(j % 2).reshape((ROWS, WIDTH)).store((value * inverse).to(gl.float8e4nv))
        fence_async_shared()
        tma.async_copy_shared_to_global(x, [outer, inner, column], x_parts.index(j))
        if FP8:
            tma.async_copy_shared_to_global(out, [outer, inner, column], o_parts.index(j % 2))


@gluon.jit(do_not_specialize=["tiles", "down", "across", "per", "rows", "whole", "size", "stride"])
def add_product_kernel(
    a, b, x, out, extra, gate, bias, scale, factor, given, tiles, down, across, per, rows, whole, size, stride,
    C: gl.constexpr, K: gl.constexpr, TAPS: gl.constexpr, HAS_EXTRA: gl.constexpr, HAS_GATE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BY_ROW: gl.constexpr, FP8: gl.constexpr,
):
    """``x [B, rows, C] += gate * (a b^T + bias + extra)``, times ``scale []`` and ``factor []`` or one of each row (BY_ROW); FP8:
    the same over ``given`` into ``out``. a, b, x and out are descriptors, the others pointers.

    ``a [.., K]``: rows of a batch row begin ``stride`` rows after those of the one before; with TAPS = 3 a row is multiplied
    together with those ``size`` and twice ``size`` behind it. ``b [C, TAPS * K]``. ``whole``: tokens of a batch row, of which
    ``rows`` are made. ``per``: tiles that hold these, ``down`` all of them, ``across`` those that hold C. A program makes every
    so many tiles.
    """
    a_parts = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], a.layout)
    b_parts = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, DEPTH], b.layout)
    x_parts = gl.allocate_shared_memory(x.dtype, [PARTS, 1, ROWS, WIDTH], x.layout)
    o_parts = x_parts
    if FP8:
        o_parts = gl.allocate_shared_memory(out.dtype, [2, 1, ROWS, WIDTH], out.layout)
    ready, empty = barriers(STAGES, 1)
    x_ready, x_empty = barriers(1, 1)
    fence_async_shared()
    TOTAL: gl.constexpr = TAPS * ((K + DEPTH - 1) // DEPTH)
    gl.warp_specialize([
        (_multiply, (a_parts, b_parts, x_parts, o_parts, ready, empty, x_ready, x_empty, x, out, extra, gate, bias, scale, factor,
                     given, tiles, down, across, per, rows, whole, size, C, TOTAL, HAS_EXTRA, HAS_GATE, HAS_BIAS, BY_ROW, FP8)),
        (_ask, (a, b, x, a_parts, b_parts, x_parts, ready, empty, x_ready, x_empty, extra, tiles, down, across, per, rows, whole,
                size, stride, C, K, TAPS, HAS_EXTRA)),
    ], [1], [40])
