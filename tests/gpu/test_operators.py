"""The fused operators on a CUDA device against float64 truth, on random awkward shapes (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch
from kernelcases import flat

from sana_video_core import SPECS, ops
from sana_video_core.dit import SanaVideoTransformer, layers
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, fused_torch, library, pairs, pairs_fused, reference

pytestmark = pytest.mark.gpu
CASES, DRAWS = 25, 20  # DRAWS random shapes in each of CASES tests: 500 an operator
REPEATS = 250
TOLERANCE = 2.0  # times the error of plain torch in bfloat16
WIDTHS = ((1, 16), (3, 32), (2, 48), (5, 64), (20, 112), (1, 128))  # heads, head channels: each is built once


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def noise(generator, *shape, scale=1.0):
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def wide(args):
    """The same arguments in float64, those in a tuple too; a history's sums become it when they are added."""
    return tuple(a.double() if isinstance(a, torch.Tensor) else wide(a) if type(a) is tuple else a for a in args)


def half_of_largest(truth: torch.Tensor) -> torch.Tensor:
    """The scale, float32, that takes half of the largest value to E4M3's largest."""
    return (truth.abs().max() / 2 / reference.E4M3_MAX).float()


def close_enough(name: str, args: tuple) -> None:
    """The error of every result is at most twice that of the same plain torch function in bfloat16."""
    ours, truth = getattr(fused, name), getattr(reference, name)
    poison(args[0])
    results = list(zip(flat(ours(*args)), flat(truth(*wide(args))), flat(truth(*args)), strict=True))
    for found, expected, plain in results[:1] if name == "linear_attention" else results:  # its sums: see below
        assert found.shape == expected.shape and bool(torch.isfinite(found).all())
        assert relative(found, expected) <= TOLERANCE * max(relative(plain, expected), 1e-3)


def poison(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next results get, so that a value nobody wrote is seen."""
    dirty = [torch.full((n * like.numel(),), float("nan"), device="cuda", dtype=like.dtype) for n in (1, 1, 2, 3)]
    del dirty


def draw(seed: int, most: int = 6000):
    """(generator, batch, frames, height, width, heads, head dim) of a case of at most ``most`` tokens."""
    pick = random.Random(seed)
    while True:
        batch, frames, height, width = pick.randint(1, 4), pick.randint(1, 9), pick.randint(1, 17), pick.randint(1, 70)
        if batch * frames * height * width <= most:
            return torch.Generator("cuda").manual_seed(seed), batch, frames, height, width, *pick.choice(WIDTHS)


def modulation(g, batch: int, frames: int, channels: int):
    return noise(g, batch, frames, 6, channels).unbind(2)[:3]


def streaming_calls(seed: int):
    """(name, arguments) of the operators that pass over the tokens once."""
    g, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    x, y, extra = (noise(g, batch, tokens, channels) for _ in range(3))
    if seed % 5 == 0:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    shift, scale, gate = modulation(g, batch, frames if seed % 2 else 1, channels)
    tail = None if seed % 2 else noise(g, batch, 1, height * width, channels)
    weight = noise(g, channels, scale=0.1) + 1
    return [("modulate_norm", (x, shift, scale)), ("gated_residual", (x, y, gate)), ("gated_residual", (x, y, gate, extra)),
            ("residual_norm", (x, y, shift, scale)), ("rms_norm", (x, weight, 1e-6)), ("temporal_taps", (x, frames, tail))]


def attention_call(seed: int):
    g, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    weights = [noise(g, channels, scale=0.1) + 1 for _ in range(2)]
    sums = (torch.rand(batch, heads, *shape, generator=g, device="cuda") for shape in ((dim, dim), (1, dim)))
    table = rope_table(frames, height, width, dim, start=seed, device="cuda")
    return ("linear_attention", (noise(g, batch, tokens, 3 * channels), *weights, *table, heads,
                                 None if seed % 2 else ops.Contribution(*sums)))


def depthwise_call(seed: int):
    g, batch, frames, height, width, heads, dim = draw(seed, 3000)
    hidden = 8 * heads + dim
    bias = None if seed % 3 == 0 else noise(g, 2 * hidden)
    x = noise(g, batch, frames * height * width, 2 * hidden) - (2 if seed % 4 == 0 else 0)
    return "gated_depthwise", (x, noise(g, 2 * hidden, 1, 3, 3, scale=0.3), bias, (height, width))


@pytest.mark.parametrize("case", range(CASES))
def test_linear_attention(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        name, args = attention_call(seed)
        close_enough(name, args)
        ours, truth = fused.linear_attention(*args)[1], reference.linear_attention(*wide(args))[1]
        assert relative(ours.vk, truth.vk) < 4e-3 and relative(ours.ksum, truth.ksum) < 1e-5


@pytest.mark.parametrize("case", range(CASES))
def test_streaming_operators(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        for name, args in streaming_calls(seed):
            close_enough(name, args)
            if name == "temporal_taps":
                assert torch.equal(fused.temporal_taps(*args)[0], reference.temporal_taps(*args)[0])


def by_taps(u, frames, tail, weight, x, y, gate):
    return reference.gated_residual(x, y, gate, torch.nn.functional.linear(reference.temporal_taps(u, frames, tail)[0], weight))


def mixed_in_time(of, u, frames, tail, weight, x, y, gate):
    sums, _ = of.time_pairs(u, frames, tail)
    products = torch.matmul(sums, of.pair_weights(weight).transpose(1, 2))
    return of.pair_residual(x, y, gate, products, frames)


@pytest.mark.parametrize("case", range(CASES))
def test_temporal_convolution_by_pairs(case):
    """Four products for six, against float64's and plain torch's own three neighbours."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        g, batch, frames, height, width, heads, dim = draw(seed)
        size, channels = height * width, heads * dim
        u, x, y = (noise(g, batch, frames * size, channels) for _ in range(3))
        u = u.transpose(1, 2).contiguous().transpose(1, 2) if seed % 5 == 0 else u
        tail = None if seed % 2 else noise(g, batch, 1, size, channels)
        weight = noise(g, channels, 3 * channels, scale=(3 * channels) ** -0.5)
        args = u, frames, tail, weight, x, y, noise(g, batch, frames if seed % 3 == 2 else 1, channels)
        truth, plain = by_taps(*wide(args)), by_taps(*args)
        poison(u)
        found = mixed_in_time(pairs_fused, *args)
        assert bool(torch.isfinite(found).all()) and relative(found, truth) <= TOLERANCE * max(relative(plain, truth), 1e-3)
        sums, wanted = pairs_fused.time_pairs(u, frames, tail)[0], pairs.time_pairs(u, frames, tail)[0]
        assert torch.equal(sums, wanted) and torch.equal(pairs_fused.pair_weights(weight), pairs.pair_weights(weight))


def added_afterwards(frames, x, y, z, weight, into, bias, gate, shift, scale, products):
    """A sum, and what reads it: queries of the text, a norm, the end of a block."""
    total = reference.gated_residual(x, torch.nn.functional.linear(y, weight, bias), gate)
    return (total, torch.nn.functional.linear(total, into, bias), reference.modulate_norm(total, shift, scale),
            pairs.pair_residual(total, z, gate, products, frames))


@pytest.mark.parametrize("case", range(CASES))
def test_outputs_added_within_their_products(case):
    """And what reads the sum, each against float64 and plain torch."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        g, batch, frames, height, width, heads, dim = draw(seed)
        size, channels = height * width, heads * dim
        x, y, z = (noise(g, batch, frames * size, channels) for _ in range(3))
        y = y.transpose(1, 2).contiguous().transpose(1, 2) if seed % 5 == 0 else y
        weight, into = (noise(g, channels, channels, scale=channels ** -0.5) for _ in range(2))
        bias, gate, shift, scale = noise(g, channels), *(noise(g, batch, 1, channels) for _ in range(3))
        products = noise(g, batch, 4, (frames + 1) // 2 * size, channels).half()
        args = x, y, z, weight, into, bias, gate, shift, scale, products
        truth, plain = added_afterwards(frames, *wide(args)), added_afterwards(frames, *args)
        poison(x)
        total, offset = fused_torch.add_product(x.clone(), y, weight, gate), gate * bias
        found = (total.double() + offset, fused_torch.shifted_product(total, offset, into, bias),
                 fused.modulate_norm(total, shift, scale, offset=offset),
                 pairs_fused.pair_residual(total, z, gate, products, frames, offset=offset))
        for ours, theirs, right in zip(found, plain, truth):
            assert bool(torch.isfinite(ours).all()) and relative(ours, right) <= TOLERANCE * max(relative(theirs, right), 1e-3)


@pytest.mark.parametrize("case", range(CASES))
def test_gated_depthwise(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        close_enough(*depthwise_call(seed))


def text_call(seed: int):
    """Rows of several lengths; keys and values that are halves of one tensor, as the network has them."""
    g, batch, frames, height, width, heads, dim = draw(seed)
    pick, channels = random.Random(seed), heads * dim
    words = pick.choice((3, 64, 128, 300))
    k, v = noise(g, batch, words, 2 * channels).chunk(2, -1)
    lengths = tuple(pick.randint(1, words) for _ in range(batch))
    norm = None if seed % 3 == 0 else (noise(g, channels, scale=0.1) + 1, 1e-6)
    return "softmax_attention", (noise(g, batch, frames * height * width, channels), k, v, heads, None, lengths, norm)


@pytest.mark.parametrize("case", range(CASES))
def test_text_attention(case):
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        name, args = text_call(seed)
        ours, truth = fused.softmax_attention, reference.softmax_attention
        poison(args[0])
        found = ours(*args)
        expected = truth(*wide(args))
        assert found.shape == expected.shape and bool(torch.isfinite(found).all())
        assert relative(found, expected) <= TOLERANCE * max(relative(truth(*args), expected), 1e-3)


@pytest.mark.parametrize("case", range(CASES))
def test_rows_scaled_by_what_makes_them(case):
    """The taps: the same bits as scaling them afterwards. The norms: as close to float64 as scaling the rounded norm."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        calls = dict(streaming_calls(seed))
        for name in ("modulate_norm", "residual_norm"):
            args = calls[name]
            poison(args[0])
            found, plain = flat(getattr(fused, f"{name}_fp8")(*args)), flat(getattr(reference, f"{name}_fp8")(*args))
            expected = flat(getattr(reference, name)(*wide(args)))
            made, theirs = ((r[-2].double() * r[-1] - expected[-1]).norm() for r in (found, plain))
            assert bool(torch.isfinite(found[-1]).all()) and float(made) <= 1.05 * float(theirs)
            if len(found) == 3:
                assert relative(found[0], expected[0]) <= TOLERANCE * max(relative(plain[0], expected[0]), 1e-3)
        poison(calls["temporal_taps"][0])
        taps, tail = fused.temporal_taps_fp8(*calls["temporal_taps"])
        plain, own = reference.temporal_taps_fp8(*calls["temporal_taps"])
        assert torch.equal(taps.scale, plain.scale) and torch.equal(tail, own)
        assert torch.equal(taps.values.view(torch.uint8), plain.values.view(torch.uint8))


def given_calls(seed: int):
    """(operator that writes at a given scale, what it is without one, arguments)."""
    calls = dict(streaming_calls(seed))
    for name in ("modulate_norm", "residual_norm", "temporal_taps"):
        yield f"{name}_fp8", name, calls[name]
    yield "gated_residual_fp8", "gated_residual", calls["gated_residual"][:3]
    for name, args in (attention_call(seed), depthwise_call(seed), text_call(seed)):
        yield name, name, args


@pytest.mark.parametrize("case", range(CASES))
def test_outputs_at_a_given_scale(case):
    """As close to float64 as scaling the rounded output; the scale cuts what is beyond half of the largest value. 125 shapes."""
    for seed in range(case * DRAWS, (case + 1) * DRAWS, 4):
        for name, plain_name, args in given_calls(seed):
            which = int(name == "residual_norm_fp8")
            truth = flat(getattr(reference, plain_name)(*wide(args)))
            given = half_of_largest(truth[which])
            poison(args[0])
            found, theirs = (flat(getattr(of, name)(*args, given=given)) for of in (fused, reference))
            which += name == "gated_residual_fp8"
            right = truth[0 if name != "residual_norm_fp8" else 1].clamp(-given * reference.E4M3_MAX, given * reference.E4M3_MAX)
            ours, plain = ((r[which].double() * given - right).norm() for r in (found, theirs))
            assert found[which].dtype == torch.float8_e4m3fn and found[which].shape == right.shape
            assert float(ours) <= 1.05 * float(plain) + 1e-6 * float(right.norm()), name
            if which == 1:
                assert relative(found[0], truth[0]) <= TOLERANCE * max(relative(theirs[0], truth[0]), 1e-3)


@pytest.mark.parametrize("name", ["scaled_fp8", "row_fp8"])
@pytest.mark.parametrize("case", range(CASES))
def test_fp8(case, name):
    assert torch.cuda.get_device_capability() >= (8, 9), "this card has no E4M3"
    for seed in range(case * DRAWS, (case + 1) * DRAWS):
        x = streaming_calls(seed)[0][1][0] * 10.0 ** (seed % 7 - 3)
        poison(x)
        (found, scale), (expected, truth) = getattr(fused, name)(x), getattr(reference, name)(x)
        assert torch.equal(scale, truth) and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_call_repeats_bit_for_bit():
    scaled = [(f"{name}_fp8", args) for name, args in streaming_calls(7)
              if hasattr(fused, f"{name}_fp8") and name != "gated_residual"]  # that one is but at a given scale
    for name, args in (*streaming_calls(7), *scaled, attention_call(8), depthwise_call(9), text_call(10)):
        ours = getattr(fused, name)
        expected = flat(ours(*args))
        for _ in range(REPEATS):
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(flat(ours(*args)), expected))


@pytest.mark.parametrize("seed", range(CASES))
def test_operators_without_triton(seed):
    for name, args in streaming_calls(seed):
        if hasattr(fused_torch, name):
            found, expected = flat(getattr(fused_torch, name)(*args)), flat(getattr(reference, name)(*wide(args)))
            plain = flat(getattr(reference, name)(*args))
            for a, b, c in zip(found, expected, plain):
                assert relative(a, b) <= TOLERANCE * max(relative(c, b), 1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_network_chooses_the_fused_operators_and_stays_close(batch):
    spec = SPECS["sana-video-mini"]
    torch.manual_seed(batch)
    exact = SanaVideoTransformer(spec, device="cuda").eval()
    for p in exact.parameters():
        p.data.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    half = SanaVideoTransformer(spec, device="cuda", dtype=torch.bfloat16).eval()
    half.load_state_dict(exact.state_dict())
    exact.double().load_state_dict(half.state_dict())
    latent = torch.randn(batch, 16, 5, 12, 20, device="cuda").bfloat16()
    caption = torch.randn(batch, 300, spec.caption_channels, device="cuda").bfloat16()
    mask = (torch.arange(300, device="cuda") < torch.tensor([[90], [7]], device="cuda")[:batch]).long()
    times = torch.full((batch,), 500.0, device="cuda")
    with torch.inference_mode():
        name, _, _ = ops.gated_depthwise.choose(torch.zeros(1, 4, 8, device="cuda").bfloat16(), None, None, (2, 2))
        assert name == "triton"
        found = half(latent, times, caption, mask)
        with ops.force("reference"):
            truth, plain = exact(latent.double(), times, caption.double(), mask), half(latent, times, caption, mask)
    assert relative(found, truth) <= TOLERANCE * relative(plain, truth)


def test_training_uses_functions_with_a_gradient():
    spec = SPECS["sana-video-mini"]
    model = SanaVideoTransformer(spec, device="cuda", dtype=torch.bfloat16)
    latent = torch.randn(1, 16, 2, 4, 4, device="cuda").bfloat16()
    caption = torch.randn(1, 300, spec.caption_channels, device="cuda").bfloat16()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    model(latent, torch.tensor([300.0], device="cuda"), caption).float().square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "y_embedding" not in name)


def test_compiled_network_keeps_the_kernels_and_gives_the_same(monkeypatch):
    """As the plain network with the temporal convolution's three neighbours: compiled graphs do not take pairs."""
    monkeypatch.setattr(layers, "takes_pairs", lambda *_: False)
    spec = SPECS["sana-video-mini"]
    model = SanaVideoTransformer(spec, device="cuda", dtype=torch.bfloat16).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
    latent = torch.randn(1, 16, 3, 8, 12, device="cuda").bfloat16()
    caption = torch.randn(1, 300, spec.caption_channels, device="cuda").bfloat16()
    seen = []

    def backend(module, inputs):
        seen.extend(n for n in module.graph.nodes if library.NAMESPACE in str(n.target))
        return module

    with torch.inference_mode():
        args = (latent, torch.tensor([300.0], device="cuda"), caption)
        expected = model(*args)
        found = torch.compile(model, backend=backend, fullgraph=True)(*args)
    assert len(seen) >= 8 * spec.depth and relative(found, expected) < 1e-6
