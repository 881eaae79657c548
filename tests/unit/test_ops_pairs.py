"""The temporal convolution for two frames at a time: the same as six products, as exact, and only where it can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernelcases import CASES, as_on_a_card, close, draw, poisoned_memory, scattered, tamper, wide  # noqa: F401  (a fixture)
from torch import nn

from longvideo import caption, latent, tiny_model
from sana_video_core import ops
from sana_video_core.dit import layers
from sana_video_core.ops import pairs, pairs_fused, reference

PAIRS = pairs.time_pairs, pairs.pair_weights, pairs.pair_residual


def arguments(seed: int, double: bool = False):
    """(u, frames, tail, weight, x, y, gate) of a case."""
    noise, batch, frames, height, width, heads, dim = draw(seed)
    size, channels, rows = height * width, heads * dim, 1 if seed % 2 else frames
    u, x, y = (noise(batch, frames * size, channels) for _ in range(3))
    tail = None if seed % 2 else noise(batch, 1, size, channels)
    weight, gate = noise(channels, 3 * channels, scale=(3 * channels) ** -0.5), noise(batch, rows, channels)
    given = u, frames, tail, weight, x, y, gate
    return tuple(a.double() if double and isinstance(a, torch.Tensor) else a for a in given)


def by_taps(u, frames, tail, weight, x, y, gate):
    """The plain way: three neighbours, one product, the sum."""
    return reference.gated_residual(x, y, gate, F.linear(reference.temporal_taps(u, frames, tail)[0], weight))


def by_pairs(u, frames, tail, weight, x, y, gate, of=pairs):
    sums, _ = of.time_pairs(u, frames, tail)
    products = torch.matmul(sums, of.pair_weights(weight).transpose(1, 2))
    return of.pair_residual(x, y, gate, products, frames)


@pytest.mark.parametrize("seed", range(3 * CASES))
def test_four_products_are_the_convolution(seed):
    args = arguments(seed, double=True)
    expected = by_taps(*args)
    assert float((by_pairs(*args) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert torch.equal(pairs.time_pairs(*args[:3])[1], reference.temporal_taps(*args[:3])[1])


@pytest.mark.parametrize("seed", range(CASES))
def test_kernels(seed):
    u, frames, tail, weight, x, y, gate = arguments(seed)
    for given in (u, scattered(u)):
        sums, own = pairs_fused.time_pairs(given, frames, tail)
        wanted, last = pairs.time_pairs(*wide(u, frames, tail))
        close(sums, wanted, u.dtype)
        assert torch.equal(own.float(), last)
    close(pairs_fused.pair_weights(weight), pairs.pair_weights(weight.float()), u.dtype)
    products = torch.randn(sums.shape, generator=torch.Generator().manual_seed(seed)).to(sums.dtype)
    found = pairs_fused.pair_residual(x, scattered(y), gate, products, frames)
    close(found, pairs.pair_residual(*wide(x, y, gate, products), frames))
    for offset in (gate[:, :1] * 3, gate[:1, :1] + 1):
        found = pairs_fused.pair_residual(x, y, gate, products, frames, offset=offset)
        close(found, pairs.pair_residual(*wide(x, y, gate, products), frames, offset=offset.float()))


def test_in_bfloat16_it_is_as_exact_as_the_plain_way():
    """Its sums and products are float16's: what the additions lose is less than what bfloat16 rounds away in the plain way."""
    generator = torch.Generator().manual_seed(0)
    errors = {by_taps: 0.0, by_pairs: 0.0}
    for frames in (2, 3, 5, 8):
        u, x, y = (torch.randn(2, frames * 6, 64, generator=generator).bfloat16() for _ in range(3))
        weight = (torch.randn(64, 192, generator=generator) / 14).bfloat16()
        gate = torch.randn(2, 1, 64, generator=generator).bfloat16()
        truth = by_taps(u.double(), frames, None, weight.double(), x.double(), y.double(), gate.double())
        for way in errors:
            errors[way] += float((way(u, frames, None, weight, x, y, gate).double() - truth).norm() / truth.norm())
    assert errors[by_pairs] < errors[by_taps]


def test_values_of_half_a_million_fit():
    u = torch.full((1, 8, 16), 5e5).bfloat16()
    assert bool(torch.isfinite(pairs.time_pairs(u, 2)[0]).all())


@pytest.fixture
def on_the_cpu(monkeypatch):
    as_on_a_card(monkeypatch, ops.OPERATORS, "triton", {f.__name__: f for f in PAIRS})


@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (2, 2), (3, 1), (4, 2), (5, 1)])
def test_a_network_gives_the_same_either_way(frames, batch, on_the_cpu):
    """Clips and blocks with a history, one time for all frames and one a frame, and the state that is left."""
    model, x, (y, mask) = tiny_model(), latent(frames, batch=batch), caption(0, batch=batch)
    times, found = torch.linspace(100, 900, batch * frames).view(batch, frames), []
    with torch.no_grad():
        for backend in ("reference", None):
            with ops.force(backend, "time_pairs"):
                _, state = model.commit(latent(3, 7, batch), y, mask)
                after = model.absorb(x, y, mask, state=state)
                found.append([model(x, times[:, 0], y, mask), model(x, times, y, mask, state=state),
                              *(t for layer in after.layers for t in layer)])
    assert all(float((a - b).norm() / a.norm()) < 1e-5 for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], found[1][1])


def test_a_layer_multiplies_either_way_the_same(on_the_cpu):
    for seed in range(2 * CASES):
        u, frames, tail, weight, x, y, gate = arguments(3 * seed)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        layer.weight.copy_(weight)
        assert layers.takes_pairs(layer, u, frames, tail) == (frames > 1)
        products = layer(ops.AlongTime.of(u, frames, tail))
        assert type(products) is torch.Tensor and products.shape[1] == 4
        close(ops.pair_residual(x, y, gate, products, frames), by_taps(u, frames, tail, weight, x, y, gate).contiguous())


def test_other_work_on_such_an_input_is_that_of_a_tensor():
    u = ops.AlongTime.of(torch.ones(1, 4, 2), 2, None)
    assert torch.equal((u + 1).as_subclass(torch.Tensor), torch.full((1, 4, 2), 2.0)) and u.shape == (1, 4, 2)


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward", "dtype", "gradient", "force", "cpu"])
def test_layers_that_others_have_changed_keep_the_plain_way(what, on_the_cpu, monkeypatch):
    layer, u = nn.Linear(6, 2, bias=False).requires_grad_(False), torch.zeros(1, 4, 2)
    assert layers.takes_pairs(layer, u, 2, None)
    tamper(layer, what)
    if what == "cpu":
        monkeypatch.undo()
    with torch.enable_grad(), ops.force("reference" if what == "force" else None):
        assert not layers.takes_pairs(layer, u, 2, None)
