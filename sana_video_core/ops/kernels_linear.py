"""The linear attention in Gluon, Triton's language for one kind of card: sums over tokens and their application on Hopper.

Import only where Triton has Gluon; called by ``linear_fused.py``, after ``key_factor_kernel``. A key is read once more instead of
being written and read: tiles of what comes next are copied into shared memory while one is multiplied, keys are normed and turned
where they lie there, and what a thread has of a query is what the product's instruction asks for. Results leave through shared
memory while the next tile is made. Two heads, side by side, share what turns them.
Words and pairs of channels as in ``kernels_attention.py``, precision too. Heads come first in the grid, so that what runs at one
time reads whole tokens. A tile is WIDE channels wide, beyond a head's it has another's, which nothing is made of.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .kernels_onto import barrier, barriers

WIDE, PAIRS = gl.constexpr(128), gl.constexpr(64)
# Tokens of a tile, tiles that shared memory holds, warps (of a head).
SUM_ROWS, SUM_STAGES, SUM_WARPS = gl.constexpr(32), gl.constexpr(5), gl.constexpr(4)
OUT_ROWS, OUT_STAGES, OUT_WARPS = gl.constexpr(64), gl.constexpr(2), gl.constexpr(4)


@gluon.jit
def _channels(words):
    """The two bfloat16 of each word as float32."""
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _turn(words):
    """Cosine and sine, two float16 in a word, as float32."""
    return (words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32),
            (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32))


@gluon.jit
def _word(first, second):
    """Two float32 as the bfloat16 of a word."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=gl.int32, is_pure=True,
                                     pack=1)


@gluon.jit
def _both(values, j, inside):
    """Float32 of channels ``2 j`` and ``2 j + 1``."""
    first = gl.load(values + 2 * j, mask=inside, other=0.0).to(gl.float32)
    return first, gl.load(values + 2 * j + 1, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def _words(tile, ROWS: gl.constexpr):
    """A tile of bfloat16 as words."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    return tile.reshape((ROWS, WIDE))._reinterpret(gl.int32, [ROWS, PAIRS], layout)


@gluon.jit
def _ask(qkv, turns, k_tiles, v_tiles, t_tiles, ready, empty, batch, first, head, heads, count, D: gl.constexpr):
    """Every tile of two heads into the place that is free next."""
    for i in range(count):
        slot, n = i % SUM_STAGES, first + i * SUM_ROWS
        mbarrier.wait(empty.index(slot), (i // SUM_STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), 5 * SUM_ROWS * WIDE * 2)
        for h in gl.static_range(2):
            column = (heads + head + h) * D
            tma.async_copy_global_to_shared(qkv, [batch, n, column], ready.index(slot), k_tiles.index(2 * slot + h))
            tma.async_copy_global_to_shared(qkv, [batch, n, column + heads * D], ready.index(slot), v_tiles.index(2 * slot + h))
        tma.async_copy_global_to_shared(turns, [n, 0], ready.index(slot), t_tiles.index(slot))


@gluon.jit
def _folded(x):
    """Tokens of a tile that one thread has, added up."""
    return gl.sum(x.reshape((SUM_ROWS // (2 * SUM_WARPS), 2 * SUM_WARPS, PAIRS)), 0)


@gluon.jit
def _sum(k_tiles, v_tiles, t_tiles, ready, empty, factor, weight, vk, ksum, tokens, batch, first, head, heads, split, splits,
         count, OWN: gl.constexpr, D: gl.constexpr):
    """One head's sums over the tiles: keys are normed and turned where they lie, while the tile before is multiplied."""
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [SUM_WARPS, 1], [1, 0])
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[SUM_WARPS, 1], instr_shape=[16, WIDE, 16])
    head += OWN
    j = gl.arange(0, PAIRS, gl.SliceLayout(0, flat))
    own = gl.arange(0, SUM_ROWS, gl.SliceLayout(1, flat))
    gain_a, gain_b = _both(weight + head * D, j, j < D // 2)
    sum_a = _folded(gl.zeros((SUM_ROWS, PAIRS), gl.float32, flat))
    sum_b = sum_a
    factor += batch * tokens
    times = gl.load(factor + first + own, mask=first + own < tokens, other=0.0)
    state = warpgroup_mma_init(gl.zeros((WIDE, WIDE), gl.float32, layout))
    for i in range(count):
        slot = i % SUM_STAGES
        mbarrier.wait(ready.index(slot), i // SUM_STAGES & 1)
        keys = _words(k_tiles.index(2 * slot + OWN), SUM_ROWS)
        a, b = _channels(keys.load(flat))
        a, b = gl.maximum(a * gain_a[None, :], 0.0) * times[:, None], gl.maximum(b * gain_b[None, :], 0.0) * times[:, None]
        sum_a += _folded(a)
        sum_b += _folded(b)
        c, s = _turn(t_tiles.index(slot).load(flat))
        keys.store(_word(a * c - b * s, a * s + b * c))
        n = first + (i + 1) * SUM_ROWS + own
        times = gl.load(factor + n, mask=n < tokens, other=0.0)
        state = warpgroup_mma_wait(0, deps=[state])
        fence_async_shared()
        barrier()
        if i > 0:
            mbarrier.arrive(empty.index((i - 1) % SUM_STAGES), count=1)
        state = warpgroup_mma(v_tiles.index(2 * slot + OWN).reshape((SUM_ROWS, WIDE)).permute((1, 0)),
                              k_tiles.index(2 * slot + OWN).reshape((SUM_ROWS, WIDE)), state, is_async=True)
    state = warpgroup_mma_wait(0, deps=[state])
    d, e = gl.arange(0, WIDE, gl.SliceLayout(1, layout)), gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    vk += ((batch * heads + head) * splits + split).to(gl.int64) * (D * D)
    gl.store(vk + d[:, None] * D + e[None, :], state, mask=(d < D)[:, None] & (e < D)[None, :])
    ksum += ((batch * splits + split) * heads + head) * D + 2 * j
    real = j < D // 2
    gl.store(ksum, gl.convert_layout(gl.sum(sum_a, 0), j.type.layout), mask=real)
    gl.store(ksum + 1, gl.convert_layout(gl.sum(sum_b, 0), j.type.layout), mask=real)


@gluon.jit(do_not_specialize=["tokens", "heads", "tiles"])
def attention_sums_kernel(qkv, turns, factor, weight, vk, ksum, tokens, heads, tiles, D: gl.constexpr):
    """Partial sums v k'^T ``[B, heads, splits, D, D]`` and of k ``[B, splits, heads, D]``, each over ``tiles`` tiles of a head.

    ``qkv [B, N, 3 C]`` and ``turns [N, D / 2]`` words are descriptors; ``factor [B, N]``: 1 / rms of the keys. Two heads are
    summed side by side and share what turns them; one warp more does nothing but ask for what comes next.
    """
    row, split, splits = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    batch, head = row // (heads // 2), row % (heads // 2) * 2
    first = split * tiles * SUM_ROWS
    count = gl.minimum(tiles, (tokens - first + SUM_ROWS - 1) // SUM_ROWS)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * SUM_STAGES, 1, SUM_ROWS, WIDE], qkv.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * SUM_STAGES, 1, SUM_ROWS, WIDE], qkv.layout)
    t_tiles = gl.allocate_shared_memory(gl.int32, [SUM_STAGES, SUM_ROWS, PAIRS], turns.layout)
    ready, empty = barriers(SUM_STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_sum, (k_tiles, v_tiles, t_tiles, ready, empty, factor, weight, vk, ksum, tokens, batch, first, head, heads, split,
                splits, count, 0, D)),
        (_sum, (k_tiles, v_tiles, t_tiles, ready, empty, factor, weight, vk, ksum, tokens, batch, first, head, heads, split,
                splits, count, 1, D)),
        (_ask, (qkv, turns, k_tiles, v_tiles, t_tiles, ready, empty, batch, first, head, heads, count, D)),
    ], [SUM_WARPS, 1], [232, 40])  # registers of a thread


@gluon.jit
def _hold_state(vk, state_a, state_b, D: gl.constexpr):
    """Put a head's state, over its largest value, where the product reads it: a row for each column of the result, by pairs of
    the keys. Returns that value."""
    flat: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [OUT_WARPS, 1], [1, 0])
    d, e = gl.arange(0, WIDE, gl.SliceLayout(1, flat)), gl.arange(0, PAIRS, gl.SliceLayout(0, flat))
    pair = gl.load(vk + d[:, None] * (D // 2) + e[None, :], mask=(d < D)[:, None] & (e < D // 2)[None, :], other=0)
    even, odd = pair.to(gl.int32).to(gl.float32, bitcast=True), (pair >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    largest = gl.maximum(gl.max(gl.max(gl.maximum(gl.abs(even), gl.abs(odd)), 0), 0), 1e-30)
    state_a.store((even / largest).to(gl.float16))
    state_b.store((odd / largest).to(gl.float16))
    fence_async_shared()
    barrier()
    return largest


@gluon.jit
def leave(result, place, out, batch, first, head):
    """A tile of a head's result, through ``place`` in shared memory, to where it belongs in ``out [B, N, heads, D]``: beyond its
    head and the last token nothing is written. The place is free again after ``tma.store_wait``."""
    place.reshape((OUT_ROWS, WIDE)).store(result.to(out.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(out, [batch, first, head, 0], place)


@gluon.jit
def _ask_queries(qkv, turns, q_tiles, t_tiles, ready, empty, batch, first, head, count, D: gl.constexpr):
    """As ``_ask``, queries."""
    for i in range(count):
        slot, n = i % OUT_STAGES, first + i * OUT_ROWS
        mbarrier.wait(empty.index(slot), (i // OUT_STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), 3 * OUT_ROWS * WIDE * 2)
        for h in gl.static_range(2):
            tma.async_copy_global_to_shared(qkv, [batch, n, (head + h) * D], ready.index(slot), q_tiles.index(2 * slot + h))
        tma.async_copy_global_to_shared(turns, [n, 0], ready.index(slot), t_tiles.index(slot))


@gluon.jit
def _apply(q_tiles, t_tiles, places, states_a, states_b, ready, empty, weight, vk, ksum, given, out, batch, first, head, heads,
           count, eps, OWN: gl.constexpr, D: gl.constexpr, FP8: gl.constexpr):
    """One head's results for the tiles; one leaves while the next is made."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[OUT_WARPS, 1], instr_shape=[16, WIDE, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    head += OWN
    row = batch * heads + head
    state_a, state_b = states_a.index(OWN), states_b.index(OWN)
    largest = _hold_state(vk + row.to(gl.int64) * (D * D // 2), state_a, state_b, D)
    if FP8:
        largest /= gl.load(given)
    j = gl.arange(0, PAIRS, gl.SliceLayout(0, left))
    gain_a, gain_b = _both(weight + head * D, j, j < D // 2)
    total_a, total_b = _both(ksum + row * D, j, j < D // 2)
    for i in range(count):
        slot = i % OUT_STAGES
        mbarrier.wait(ready.index(slot), i // OUT_STAGES & 1)
        a, b = _channels(_words(q_tiles.index(2 * slot + OWN), OUT_ROWS).load(left))
        a, b = gl.maximum(a * gain_a[None, :], 0.0), gl.maximum(b * gain_b[None, :], 0.0)
        times = 1.0 / gl.maximum(gl.max(gl.maximum(a, b), 1), 1e-30)
        below = (gl.sum(a * total_a[None, :] + b * total_b[None, :], 1) + eps) * times
        c, s = _turn(t_tiles.index(slot).load(left))
        c, s = c * times[:, None], s * times[:, None]
        turned_a, turned_b = (a * c - b * s).to(gl.float16), (a * s + b * c).to(gl.float16)
        above = gl.zeros((OUT_ROWS, WIDE), gl.float32, layout)
        above = warpgroup_mma(turned_a, state_a.permute((1, 0)), above, use_acc=False, is_async=True)
        above = warpgroup_mma(turned_b, state_b.permute((1, 0)), above, is_async=True)
        tma.store_wait(0)  # the tile before has left
        barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        above = warpgroup_mma_wait(0, deps=[above])
        leave(above * gl.convert_layout(largest / below, gl.SliceLayout(1, layout))[:, None], places.index(OWN), out, batch,
              first + i * OUT_ROWS, head)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "heads", "tiles"])
def attention_outputs_kernel(
    qkv, turns, weight, vk, ksum, given, out, tokens, heads, tiles, eps, D: gl.constexpr, FP8: gl.constexpr,
):
    """``(state q') / (ksum . q + eps)`` for ``tiles`` tiles of two heads, see ``kernels_attention.py``. ``vk`` comes as int64,
    ``out [B, N, heads, D]`` as a descriptor."""
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row = gl.program_id(0)
    batch, head = row // (heads // 2), row % (heads // 2) * 2
    first = gl.program_id(1) * tiles * OUT_ROWS
    count = gl.minimum(tiles, (tokens - first + OUT_ROWS - 1) // OUT_ROWS)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * OUT_STAGES, 1, OUT_ROWS, WIDE], qkv.layout)
    t_tiles = gl.allocate_shared_memory(gl.int32, [OUT_STAGES, OUT_ROWS, PAIRS], turns.layout)
    places = gl.allocate_shared_memory(out.dtype, [2, 1, OUT_ROWS, 1, WIDE], out.layout)
    states_a = gl.allocate_shared_memory(gl.float16, [2, WIDE, PAIRS], shared)
    states_b = gl.allocate_shared_memory(gl.float16, [2, WIDE, PAIRS], shared)
    ready, empty = barriers(OUT_STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_apply, (q_tiles, t_tiles, places, states_a, states_b, ready, empty, weight, vk, ksum, given, out, batch, first, head,
                  heads, count, eps, 0, D, FP8)),
        (_apply, (q_tiles, t_tiles, places, states_a, states_b, ready, empty, weight, vk, ksum, given, out, batch, first, head,
                  heads, count, eps, 1, D, FP8)),
        (_ask_queries, (qkv, turns, q_tiles, t_tiles, ready, empty, batch, first, head, count, D)),
    ], [OUT_WARPS, 1], [232, 40])  # as above
