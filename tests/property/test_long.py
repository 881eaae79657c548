"""Properties of long video on random cases: partitions, saving, the block-causal mask, streaming decode, films, memory."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import films
from longvideo import CASES, GRID, caption, latent, same_state, tiny_model, tiny_spec, tiny_vae
from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table, time_sinusoid, unpatchify
from sana_video_core.dit.layers import Context
from sana_video_core.film import Film, FilmPlan, WanStream
from sana_video_core.ops.reference import rotate
from sana_video_core.sampling.blocks import Condition, Recipe, prefill, sample_blocks
from sana_video_core.sampling.guidance import Caption
from sana_video_core.sampling.plan import BlockPlan, plan_blocks, split
from sana_video_core.state import RecurrentState
from sana_video_core.vae.wan import WanCache

many = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SOAK = int(os.environ.get("SANA_VIDEO_SOAK", "600"))  # blocks; 2000 for a release

texts_of = st.lists(st.integers(0, 2), min_size=6, max_size=6)
lengths_of = st.lists(st.integers(1, 4), min_size=2, max_size=6)
recipes = st.sampled_from([
    Recipe.few_step((1.0, 0.7, 0.0)), Recipe.few_step((0.9, 0.0)), Recipe.multi_step((1.0, 0.5, 0.0), "flow Euler", 2.0),
    Recipe.multi_step((0.99, 0.5, 0.2, 0.0), "flow-DPM"),
])


def condition(text: int) -> Condition:
    return Condition(Caption(*caption(text)), Caption(*caption(40, tokens=4)))


def sample(plan, texts, recipe, seed, state=None, **options):
    return list(sample_blocks(tiny_model(), plan, lambda i: condition(texts[i]), spec=tiny_spec(), size=GRID, recipe=recipe,
                              seed=seed, state=state, **options))


# ------------------------------------------------------------------------------------------------------------- partitions

@many
@given(lengths_of, texts_of, recipes, st.integers(0, 2**64 - 1), st.integers(0, 3), st.booleans(), st.data())
def test_any_run_in_parts_with_saving_between_is_the_same_film(lengths, texts, recipe, seed, window, recompute, data):
    options = {"window": window, "recompute": recompute}
    whole = sample(BlockPlan(tuple(lengths)), texts, recipe, seed, **options)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths) - 1), max_size=3)))
    state, blocks = None, []
    with tempfile.TemporaryDirectory() as folder:
        for start, end in zip([0, *cuts], [*cuts, len(lengths)]):
            plan = BlockPlan(tuple(lengths[start:end]), start, sum(lengths[:start]))
            blocks += sample(plan, texts, recipe, seed, state, **options)
            blocks[-1].state.save(Path(folder) / "s.safetensors")
            state = RecurrentState.load(Path(folder) / "s.safetensors", tiny_spec())
            assert same_state(state, blocks[-1].state)
    for a, b in zip(blocks, whole, strict=True):
        assert torch.equal(a.latent, b.latent) and a.index == b.index and a.start == b.start
    assert same_state(state, whole[-1].state)


@many
@given(lengths_of, texts_of, st.booleans(), st.integers(0, 2))
def test_states_made_from_latents_are_those_of_the_run(lengths, texts, recompute, window):
    recipe = Recipe.few_step((1.0, 0.0))
    whole = sample(BlockPlan(tuple(lengths)), texts, recipe, 3, recompute=recompute, window=window)
    again = prefill(tiny_model(), torch.cat([b.latent for b in whole], 2), lambda i: condition(texts[i]), spec=tiny_spec(),
                    lengths=lengths, recompute=recompute, window=window)
    assert same_state(again, whole[-1].state)


@many
@given(st.integers(1, 3000), st.integers(1, 40))
def test_the_official_partition_covers_the_film(total, base):
    lengths = split(total, base)
    assert sum(lengths) == total and all(n == base for n in lengths[1:])
    assert base <= lengths[0] < 2 * base or (len(lengths) == 1 and total < 2 * base)
    spans = BlockPlan(lengths).spans()
    assert all(a.end == b.start and a.pixels()[1] == b.pixels()[0] for a, b in zip(spans, spans[1:], strict=False))
    assert spans[0].pixels()[0] == 0 and spans[-1].pixels()[1] == 4 * (total - 1) + 1


# ------------------------------------------------------------------------------------------------- the block-causal mask

def _masked_attention(attn, x, cos, sin, block_of):
    """Attention of all tokens under an explicit mask: token i sees token j when j's block is not after i's. Float64."""
    q, k, v = attn.qkv(x).chunk(3, -1)
    norm = [F.relu(t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-5) * n.weight)
            for t, n in ((q, attn.q_norm), (k, attn.k_norm))]
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (*norm, v))
    turned = [rotate(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k)]
    mask = (block_of[None, :] <= block_of[:, None]).double()
    top = (turned[0] @ turned[1].transpose(-1, -2) * mask) @ v
    below = (q @ k.transpose(-1, -2) * mask).sum(-1, keepdim=True) + attn.eps
    return attn.proj((top / below).transpose(1, 2).flatten(2))


def _bordered_convolution(mlp, u, frames, starts):
    """The temporal convolution with zeros on the right of every block's last frame."""
    u = u.unflatten(1, (frames, -1))
    out = []
    for f in range(frames):
        left = u[:, f - 1] if f else torch.zeros_like(u[:, f])
        right = u[:, f + 1] if f + 1 < frames and f + 1 not in starts else torch.zeros_like(u[:, f])
        out.append(u[:, f] + mlp.t_conv(torch.cat((left, u[:, f], right), -1)))
    return torch.stack(out, 1).flatten(1, 2)


@lru_cache(maxsize=4)
def double_model(depth: int):
    return copy.deepcopy(tiny_model(depth=depth)).double()


def full_sequence(model, x, times, text, mask, lengths):
    """The whole network over the whole sequence at once, in float64, with the mask spelled out."""
    frames, height, width = x.shape[2], GRID[0] // 2, GRID[1] // 2
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    block_of = torch.cat([torch.full((n * height * width,), i) for i, n in enumerate(lengths)])
    cos, sin = rope_table(frames, height, width, model.spec.linear_head_dim, 0, torch.float64)
    time_ = model.t_embedder(time_sinusoid(times).double())
    rows = model.t_block(time_).unflatten(-1, (6, -1))
    ctx = Context((frames, height, width), rows, model.attention_y_norm(model.y_embedder(text.double())), mask, cos, sin)
    h = model.x_embedder(x.double())
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + rows).unbind(2)
        h = ops.gated_residual(h, _masked_attention(block.attn, ops.modulate_norm(h, shift1, scale1), cos, sin, block_of), gate1)
        h = h + block.cross_attn(h, ctx)
        u = block.mlp.spatial(ops.modulate_norm(h, shift2, scale2), (height, width))
        h = ops.gated_residual(h, _bordered_convolution(block.mlp, u, frames, starts), gate2)
    return unpatchify(model.final_layer(h, time_), (frames, height, width), model.spec.patch)


@many
@given(lengths_of, st.integers(1, 3), st.integers(1, 999), st.integers(0, 10**6))
def test_blocks_with_a_state_equal_the_block_causal_mask(lengths, depth, noisy, seed):
    model, (text, mask) = tiny_model(depth=depth), caption(seed % 7)
    x = latent(sum(lengths), seed)
    times = torch.zeros(1, sum(lengths))
    times[:, sum(lengths[:-1]):] = noisy  # the last block is being denoised, the earlier ones are clean
    with torch.no_grad():
        expected = full_sequence(double_model(depth), x, times, text, mask, lengths)
        state, out = None, []
        for i, n in enumerate(lengths):
            part = x[:, :, sum(lengths[:i]):sum(lengths[:i]) + n]
            if i == len(lengths) - 1:
                out.append(model(part, torch.tensor([float(noisy)]), text, mask, state=state))
            else:
                v, state = model.commit(part, text, mask, state=state)
                out.append(v)
    error = float((torch.cat(out, 2).double() - expected).norm() / expected.norm())
    assert error <= 1e-5, error


# ------------------------------------------------------------------------------------------------------- streaming decode

@lru_cache(maxsize=1)
def decoded(frames: int = 48):
    z = torch.randn(1, 4, frames, 2, 2, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        return z, tiny_vae().decode(z)


@pytest.mark.timeout(1200)  # 500 cases take five minutes
@many
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_streaming_decode_of_any_partition_is_the_full_decode(parts, data):
    z, full = decoded()
    vae, total = tiny_vae(), sum(parts)
    with torch.no_grad():
        cache, at, pieces = WanCache(), 0, []
        for n in parts:
            pieces.append(vae.decode(z[:, :, at:at + n], cache))
            at += n
        assert torch.equal(torch.cat(pieces, 2), full[:, :, :4 * total - 3])
        begin = data.draw(st.integers(1, 46))
        stream = WanStream(vae)
        stream.start(z[:, :, max(0, begin - stream.memory):begin])
        more = data.draw(st.integers(1, 48 - begin))
        tail = torch.cat(list(stream.decode(z[:, :, begin:begin + more])))
    expected = full[0, :, 4 * begin - 3:4 * (begin + more) - 3].movedim(0, -1)
    assert torch.equal(tail, (expected.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8))


# ------------------------------------------------------------------------------------------------------------------ films

@many
@given(lengths_of, texts_of, st.data())
def test_contracts_change_from_the_edited_block_on(lengths, texts, data):
    plan = films.plan(lengths, texts)
    block = data.draw(st.integers(0, len(lengths) - 1))
    change = data.draw(st.sampled_from([{"seed": 8}, {"frames": 9}, {"caption": "other"}, {"patches": "lora"}]))
    edited = plan.edit(block, **change)
    assert [a == b for a, b in zip(plan.contracts, edited.contracts, strict=True)] == [i < block for i in range(len(lengths))]
    assert FilmPlan.from_json(edited.to_json()) == edited


@settings(parent=many, max_examples=max(8, CASES // 8))
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), texts_of, st.data())
def test_a_film_edited_at_random_is_the_film_made_straight(lengths, texts, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        seeds = {}
        for _ in range(3):
            block = data.draw(st.integers(0, len(lengths) - 1))
            seeds[block] = data.draw(st.integers(0, 3))
            stop = data.draw(st.integers(1, len(lengths)))
            films.shoot(path, films.plan(lengths[:stop], texts, seeds), texts, video=False)
        films.shoot(path, films.plan(lengths, texts, seeds), texts, video=False)
        straight = sample_blocks(tiny_model(), BlockPlan(tuple(lengths)), lambda i: films.condition(texts[i]), spec=tiny_spec(),
                                 size=GRID, recipe=films.RECIPE, seed=lambda i: seeds.get(i, 7), model_print="weights")
        with Film(path, write=False) as film:
            for i, block in enumerate(straight):
                assert torch.equal(film.latent(i), block.latent) and same_state(film.state_after(i), block.state)


# ----------------------------------------------------------------------------------------------------------------- memory

def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_time_do_not_grow_with_the_film():
    plan = plan_blocks(SOAK, 2)
    run = sample_blocks(tiny_model(), plan, condition(0), spec=tiny_spec(), size=GRID, recipe=Recipe.few_step((1.0, 0.0)), seed=1)
    sizes, memory, states = [], [], {}
    warm = SOAK // 4
    for block in run:
        sizes.append(block.state.nbytes())
        if block.index in (10, SOAK - 1):
            states[block.index] = block.state
        if block.index in (warm, SOAK - 1):
            gc.collect()
            memory.append(resident())
    assert len(sizes) == SOAK and sizes[1] == sizes[-1]
    slope = (memory[1] - memory[0]) / (SOAK - warm) * 1000 / 2**20
    assert slope <= 1.0, f"{slope:.2f} MiB per 1000 blocks"
    early = late = float("inf")
    for _ in range(5):  # the least of each falls to what the work takes, however busy the machine is
        early, late = map(min, (early, late), times_of_a_block(*states.values()))
        if late <= 1.03 * early:
            break
    assert late <= 1.03 * early, f"the work of a block grows with the film: {early * 1e3:.2f} ms, then {late * 1e3:.2f} ms"


def times_of_a_block(*states) -> list[float]:
    """Least seconds of the processor for the block after each state. They take turns, so that whatever else the machine does
    falls on all of them alike, and the least of many is what the work itself takes."""
    times = [[] for _ in states]
    for _ in range(300):
        for state, mine in zip(states, times):
            plan = BlockPlan((2,), state.blocks, state.position)
            begin = time.process_time()
            next(sample_blocks(tiny_model(), plan, condition(0), spec=tiny_spec(), size=GRID,
                               recipe=Recipe.few_step((1.0, 0.0)), seed=1, state=state))
            mine.append(time.process_time() - begin)
    return [min(mine) for mine in times]


def test_state_bytes_are_those_of_the_model():
    state = sample(plan_blocks(3, 2), [0] * 3, Recipe.few_step((1.0, 0.0)), 1, keep_undo=False)[-1].state
    spec = tiny_spec()
    tokens = GRID[0] // 2 * (GRID[1] // 2)
    layer = spec.linear_heads * spec.linear_head_dim ** 2 + spec.width + spec.width * tokens
    assert state.nbytes() == 4 * spec.depth * layer
