"""The text attention in Gluon, Triton's language for one kind of card: softmax over a prompt's tokens on Hopper.

Import only where Triton has Gluon; called by ``softmax_fused.py``, after ``query_factor_kernel``. As in ``kernels_text.py`` the
queries are multiplied as they come. A head's text stays in shared memory; one warp asks for queries, two or three groups of four
take turns with them, so that the exponentials of one run beside the products of another; results leave from where the queries
were. More than CHUNK tokens of text are taken piece by piece, and what came before is scaled by what the largest score has grown.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .kernels_linear import OUT_ROWS as ROWS
from .kernels_linear import OUT_WARPS as WARPS
from .kernels_linear import WIDE, leave
from .kernels_onto import barrier, barriers


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _ask_queries(q, tiles, ready, empty, first, column, count, STAGES: gl.constexpr):
    """Every tile of queries into the place that is free next."""
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), ROWS * WIDE * 2)
        tma.async_copy_global_to_shared(q, [first + i * ROWS, column], ready.index(slot), tiles.index(slot))


@gluon.jit
def _scores(query, keys, D: gl.constexpr, CHUNK: gl.constexpr, layout: gl.constexpr):
    """``query keys^T`` over the D channels of a head, to be waited for: what a tile has beyond them is another head's."""
    score = gl.zeros((ROWS, CHUNK), gl.float32, layout)
    score = warpgroup_mma(query.slice(0, 64, 1), keys.slice(0, 64, 1).permute((1, 0)), score, use_acc=False, is_async=True)
    if D == WIDE:
        score = warpgroup_mma(query.slice(64, 64, 1), keys.slice(64, 64, 1).permute((1, 0)), score, is_async=True)
    else:
        if D - 64 >= 32:
            score = warpgroup_mma(query.slice(64, 32, 1), keys.slice(64, 32, 1).permute((1, 0)), score, is_async=True)
        if D % 32:
            score = warpgroup_mma(query.slice(D - 16, 16, 1), keys.slice(D - 16, 16, 1).permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def _shares(score, each, below, most, layout: gl.constexpr, MORE: gl.constexpr):
    """Softmax of one piece of the text: (its shares as the product takes them, their sum, the largest score so far, how much what
    came before counts now); MORE: something came before."""
    largest = gl.max(score, 1) * each
    grown = gl.zeros_like(largest)
    if MORE:
        largest = gl.maximum(largest, most)
        grown = _exp2(most - largest)
        below *= grown
    share = _exp2(score * each[:, None] - largest[:, None])
    below += gl.sum(share, 1)
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    return gl.convert_layout(share.to(gl.bfloat16), left), below, largest, gl.convert_layout(grown, gl.SliceLayout(1, layout))


@gluon.jit
def _scale_of(factor, n, tokens, scale, HAS_NORM: gl.constexpr):
    """What the scores of tokens n are multiplied with."""
    each = gl.full(n.shape, 1.0, gl.float32, n.type.layout) * scale
    if HAS_NORM:
        each *= gl.load(factor + n, mask=n < tokens, other=1.0)
    return each


@gluon.jit
def _attend(tiles, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
            OWN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, HAS_NORM: gl.constexpr, D: gl.constexpr,
            FP8: gl.constexpr, CHUNK: gl.constexpr, CHUNKS: gl.constexpr):
    """Tiles of one group: their scores, softmax, and sums of the values; each leaves from where its queries were.

    Two products are made together: a piece's sums of values, and the scores of the piece or the tile after.
    """
    scored: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, CHUNK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDE, 16])
    line: gl.constexpr = gl.SliceLayout(1, scored)
    last = gl.arange(0, CHUNK, gl.SliceLayout(0, scored)) < words - (CHUNKS - 1) * CHUNK
    n = first + gl.arange(0, ROWS, line)
    score, each = gl.zeros((ROWS, CHUNK), gl.float32, scored), gl.zeros((ROWS,), gl.float32, line)
    if OWN < count:
        each = _scale_of(factor, n + OWN * ROWS, tokens, scale, HAS_NORM)
        mbarrier.wait(ready.index(OWN), 0)
        score = warpgroup_mma_wait(0, deps=[_scores(tiles.index(OWN), keys.index(0), D, CHUNK, scored)])
    for i in range(OWN, count, GROUPS):
        query, after = tiles.index(i % STAGES), i + GROUPS
        after_each = _scale_of(factor, n + after * ROWS, tokens, scale, HAS_NORM)
        above = gl.zeros((ROWS, WIDE), gl.float32, summed)
        most, below = gl.full((ROWS,), float("-inf"), gl.float32, line), gl.zeros((ROWS,), gl.float32, line)
        for c in range(CHUNKS - 1):
            share, below, most, grown = _shares(score, each, below, most, summed, True)
            above = warpgroup_mma(share, values.index(c), above * grown[:, None], is_async=True)
            score = _scores(query, keys.index(c + 1), D, CHUNK, scored)
            above, score, share = warpgroup_mma_wait(0, deps=[above, score, share])
        if i >= GROUPS:  # the tile before has left
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(empty.index((i - GROUPS) % STAGES), count=1)
        share, below, most, grown = _shares(gl.where(last[None, :], score, float("-inf")), each, below, most, summed, CHUNKS > 1)
        if CHUNKS > 1:
            above *= grown[:, None]
        if after < count:
            mbarrier.wait(ready.index(after % STAGES), after // STAGES & 1)
        above = warpgroup_mma(share, values.index(CHUNKS - 1), above, use_acc=CHUNKS > 1, is_async=True)
        score = _scores(tiles.index(after % STAGES), keys.index(0), D, CHUNK, scored)  # after the last tile, of anything
        above, score, share = warpgroup_mma_wait(0, deps=[above, score, share])
        if FP8:
            below *= gl.load(given)
        above *= gl.convert_layout(1.0 / below, gl.SliceLayout(1, summed))[:, None]
        place = query._reinterpret(out.dtype, [16 // out.dtype.primitive_bitwidth, 1, ROWS, 1, WIDE], out.layout).index(0)
        leave(above, place, out, row, first + i * ROWS, head)
        each = after_each
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row", "tokens", "words", "tiles"])
def text_softmax_kernel(
    q, factor, weight, k, v, given, out, row, tokens, words, tiles, k_row, v_row, scale, HAS_NORM: gl.constexpr,
    D: gl.constexpr, FP8: gl.constexpr, CHUNK: gl.constexpr, CHUNKS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):
    """Softmax attention of ``tiles`` tiles of queries of one head over ``words`` text tokens (at most CHUNKS * CHUNK), of one row
    of a batch. ``q [N, C]`` and ``out [B, N, heads, D]``, of which row ``row`` is made, are descriptors. ``scale`` counts in
    powers of two. FP8: the output is over ``given []``."""
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    head = gl.program_id(0)
    first = gl.program_id(1) * tiles * ROWS
    count = gl.minimum(tiles, (tokens - first + ROWS - 1) // ROWS)
    queries = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, WIDE], q.layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, CHUNK, WIDE], shared)
    values = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, CHUNK, WIDE], shared)
    ready, empty = barriers(STAGES, 1)
    d = gl.arange(0, WIDE, gl.SliceLayout(0, flat))
    for c in gl.static_range(CHUNKS):
        w = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, flat))
        key = gl.load(k + w[:, None] * k_row + (head * D + d)[None, :], mask=(w < words)[:, None] & (d < D)[None, :], other=0.0)
        if HAS_NORM:
            gain = gl.load(weight + head * D + d, mask=d < D, other=0.0).to(gl.float32)
            key = (key.to(gl.float32) * gain[None, :]).to(gl.bfloat16)
        keys.index(c).store(key)
        value = gl.load(v + w[:, None] * v_row + (head * D + d)[None, :], mask=(w < words)[:, None] & (d < D)[None, :], other=0.0)
        values.index(c).store(value)
    fence_async_shared()
    barrier()
    if GROUPS == 3:
        gl.warp_specialize([
            (_attend, (queries, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
                       0, GROUPS, STAGES, HAS_NORM, D, FP8, CHUNK, CHUNKS)),
            (_attend, (queries, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
                       1, GROUPS, STAGES, HAS_NORM, D, FP8, CHUNK, CHUNKS)),
            (_attend, (queries, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
                       2, GROUPS, STAGES, HAS_NORM, D, FP8, CHUNK, CHUNKS)),
            (_ask_queries, (q, queries, ready, empty, first, head * D, count, STAGES)),
        ], [WARPS, WARPS, 1], [152, 152, 40])
    else:
        gl.warp_specialize([
            (_attend, (queries, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
                       0, GROUPS, STAGES, HAS_NORM, D, FP8, CHUNK, CHUNKS)),
            (_attend, (queries, keys, values, ready, empty, factor, given, out, row, first, head, tokens, words, count, scale,
                       1, GROUPS, STAGES, HAS_NORM, D, FP8, CHUNK, CHUNKS)),
            (_ask_queries, (q, queries, ready, empty, first, head * D, count, STAGES)),
        ], [WARPS, 1], [232, 40])
