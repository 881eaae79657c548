"""The kernels in Gluon on the CPU: values at awkward sizes, what barriers allow, nothing left unwritten (``gluon_cpu.py``)."""

from __future__ import annotations

import random
import types

import gluon_cpu
import pytest
import torch
from kernelcases import poisoned_memory  # noqa: F401  (a fixture)

from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, linear_fused, onto_fp8, onto_fused, reference, softmax_fused
from sana_video_core.ops.reference import Contribution, Rows

MODULES = gluon_cpu.kernels("kernels_onto", "kernels_onto_frames", "kernels_linear", "kernels_softmax")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Launches run here, and what goes around them in Triton's interpreter. Few programs, so that each has many tiles."""
    for module in (linear_fused, softmax_fused, onto_fused):
        monkeypatch.setattr(module, "_kernels", lambda name="kernels": MODULES.get(name) or fused._kernels(name))
        monkeypatch.setattr(module, "pieces", gluon_cpu.Descriptor)
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    monkeypatch.setattr(onto_fused, "_processors", lambda device: 2)


def noise(seed: int):
    """What makes a case's tensors; what happens beside its programs goes by the same seed."""
    g = torch.Generator().manual_seed(seed)
    gluon_cpu.Kernel.seed = seed
    return lambda *shape, scale=1.0: (torch.randn(shape, generator=g) * scale).bfloat16()


def double(*args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def close(found, truth, plain, factor: float = 2.0) -> None:
    """An error at most ``factor`` times that of plain torch in bfloat16."""
    error, allowed = (float((x.double() - truth).norm() / truth.norm()) for x in (found, plain))
    assert found.shape == truth.shape and error <= factor * max(allowed, 1e-3), (error, allowed)


def close_in_e4m3(call, truth, plain) -> None:
    """The same at a scale that cuts what is beyond half of the largest value: as close as scaling the plain result."""
    given = (truth.abs().max() / 2 / reference.E4M3_MAX).float()
    rows, right = call(given), truth.clamp(-given * reference.E4M3_MAX, given * reference.E4M3_MAX)
    assert rows.scale is given
    close(rows.values.double() * given, right, reference.given_fp8(plain, given).values.double() * given, 1.05)


def attention(seed: int):
    pick, made = random.Random(seed), noise(seed)
    heads, dim = ((2, 80), (2, 128), (4, 112))[seed % 3]
    batch, grid = 1 + seed % 2, (pick.randint(1, 3), pick.randint(1, 9), pick.randint(1, 25))
    weights = [made(heads * dim, scale=0.1) + (1 if seed % 3 else -1) for _ in range(2)]
    sums = Contribution(torch.rand(batch, heads, dim, dim), torch.rand(batch, heads, 1, dim))
    qkv = made(batch, grid[0] * grid[1] * grid[2], 3 * heads * dim)
    return qkv, *weights, *rope_table(*grid, dim, start=seed), heads, None if seed % 2 else sums


def linear_attention_is_right(args) -> None:
    (truth, right), (plain, _) = reference.linear_attention(*double(*args)), reference.linear_attention(*args)
    found, own = linear_fused.linear_attention(*args)
    close(found, truth, plain)
    assert (own.vk - right.vk).norm() < 4e-3 * right.vk.norm() and (own.ksum - right.ksum).norm() < 1e-5 * right.ksum.norm()
    close_in_e4m3(lambda given: linear_fused.linear_attention(*args, given=given)[0], truth, plain)


@pytest.mark.parametrize("seed", range(6))
def test_linear_attention(seed):
    linear_attention_is_right(attention(seed))


@pytest.mark.parametrize("words", [(5,), (64, 3), (128,), (65, 190), (320,)])
def test_text_attention(words):
    """Tiles enough for every place to be used twice."""
    made, heads, dim = noise(sum(words)), 2, 80 if len(words) > 1 else 112
    q, text = made(len(words), 64 * 15 + 7, heads * dim), made(len(words), max(words) + 3, 2 * heads * dim).chunk(2, -1)
    norm = None if sum(words) % 2 else (made(heads * dim, scale=0.1) + 1, 1e-6)
    truth = reference.softmax_attention(*double(q, *text), heads, None, words, None if norm is None else double(*norm))
    plain = reference.softmax_attention(q, *text, heads, None, words, norm)
    close(softmax_fused.softmax_attention(q, *text, heads, None, words, norm), truth, plain)
    close_in_e4m3(lambda given: softmax_fused.softmax_attention(q, *text, heads, None, words, norm, given=given), truth, plain)


def product(seed: int, frames: int, by_row: bool):
    """Tokens ``[2, N, 272]`` and what is added to them."""
    made, size, inner = noise(seed), 37, 144
    tokens = frames * size if frames else 200
    rows = 2 * (frames + 2) * size if frames else 2 * tokens
    scale = torch.rand(rows, 1) + 0.5 if by_row else torch.tensor(0.7)
    y = Rows(made(rows, inner).to(torch.float8_e4m3fn), scale)
    weight = Rows(made(272, 3 * inner if frames else inner, scale=0.1).to(torch.float8_e4m3fn), torch.tensor(1.3))
    return made(2, tokens, 272), y, weight, made(272), made(2, 1, 272), made(2, tokens, 272)


@pytest.mark.parametrize(("frames", "together", "by_row"), [(0, 0, False), (0, 0, True), (5, 0, False), (5, 4, False)])
def test_product_added_to_the_tokens(frames, together, by_row):
    """Also rows of batches that end within a tile, and the frames left over when four are taken together."""
    x, y, weight, bias, gate, extra = product(frames + together + by_row, frames, by_row)
    for more, given in ((extra, None), (None, torch.tensor(0.02))):
        truth = x.double()
        onto_fp8.add_product_fp8(truth, y, weight, *double(bias, gate, more), frames=frames)
        goal = x.clone()
        found = onto_fused._added(goal, y, weight, bias, gate, more, frames, together, given)
        close(goal, truth, truth.bfloat16())
        if given is None:
            assert found is goal
        else:
            right = reference.given_fp8(truth.float(), given).values.double()
            assert found.scale is given and float((found.values.double() - right).norm() / right.norm()) < 0.01


@pytest.mark.parametrize(("part", "function", "wrong", "words"), [
    ("mbarrier", "arrive", lambda *_, **__: None, "wait for each other"),
    ("mbarrier", "wait", lambda *_: None, None),
    ("mbarrier", "expect", lambda barrier, size: barrier.change(1, size // 2), None),
    ("tma", "store_wait", lambda pending: None, "what leaves it"),
    ("tma", "async_copy_shared_to_global", lambda *_: None, None),
    (None, "warpgroup_mma_wait", lambda pending, deps: deps[0], "before it was waited for"),
])
def test_what_would_go_wrong_on_a_card_goes_wrong_here(monkeypatch, part, function, wrong, words):
    module = MODULES["kernels_linear"]
    if part is None:
        monkeypatch.setattr(module, function, wrong)
    else:
        monkeypatch.setattr(module, part, types.SimpleNamespace(**vars(getattr(module, part)) | {function: wrong}))
    with pytest.raises(AssertionError, match=words):
        made = noise(0)
        linear_attention_is_right((made(1, 450, 480), made(160), made(160), *rope_table(2, 9, 25, 80), 2))


@gluon_cpu.jit
def lonely(a, b):
    barriers = gluon_cpu.allocate(None, [2, 1], gluon_cpu.MBarrierLayout())
    for i in range(2):
        barriers.all[i].count = barriers.all[i].missing = 1

    def waits(own: int):
        gluon_cpu.wait(barriers.index(own), 0)
        barriers.index(1 - own).change(1, 0)

    gluon_cpu.NOW[-1].specialise([(waits, (0,)), (waits, (1,))])


def test_partitions_that_wait_for_each_other_are_found():
    with pytest.raises(AssertionError, match="wait for each other"):
        lonely[(1,)](1, 2)


def test_an_access_outside_of_a_tensor_is_found():
    pointer = gluon_cpu.Pointer.of(torch.arange(6.0)[2:])
    assert float(gluon_cpu.load(pointer + 3).t) == 5
    inside = gluon_cpu.Value(torch.tensor([True, False]))
    assert gluon_cpu.load(pointer + gluon_cpu.Value(torch.tensor([3, 4])), inside, 7.0).t.tolist() == [5, 7]
    with pytest.raises(AssertionError, match="outside"):
        gluon_cpu.load(pointer + 4)
