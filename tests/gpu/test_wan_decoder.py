"""The fused Wan decoder and its operators on a CUDA device against float64 truth (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sana_video_core import ops
from sana_video_core.film import WanStream
from sana_video_core.film.transfer import to_cpu
from sana_video_core.ops import frames, frames_fused
from sana_video_core.ops.frames import PAST
from sana_video_core.vae import fused
from sana_video_core.vae.wan import WanCache
from wanvae import random_vae, relative

pytestmark = pytest.mark.gpu
TOLERANCE = 2.0  # times the error of plain torch in bfloat16
WIDTHS = ((16, 96), (96, 96), (192, 192), (192, 384), (48, 80))  # input, output channels: each is built once
DRAWS = 20
REPEATS = 50


@pytest.fixture(autouse=True)
def exact_truth():
    """Convolutions and products without TF32; everything as before afterwards."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
        yield
    torch.backends.cuda.matmul.allow_tf32 = products


class Draw:
    """Random frames of a random awkward size."""

    def __init__(self, seed: int):
        pick = random.Random(seed)
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.size = pick.randint(1, 2), pick.randint(1, 6), pick.randint(1, 40), pick.randint(1, 90)
        self.channels, self.outputs = pick.choice(WIDTHS)
        self.begins = seed % 3 == 0
        self.x = self.noise(*self.size, self.channels)

    def noise(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self.generator, device="cuda") * scale).bfloat16()

    def kernel(self, outputs: int, *taps: int):
        scale = (torch.Size(taps).numel() * self.channels) ** -0.5
        return self.noise(outputs, *taps, self.channels, scale=scale), self.noise(outputs, scale=0.3)

    def history(self, border: int = 1):
        batch, _, height, width = self.size
        before = self.noise(batch, PAST, height, width, self.channels)
        return None if self.begins else F.pad(before, (0, 0, *(border,) * 4))

    def window(self):
        window = frames.open_window(self.x)
        window[:, :PAST] = float("nan")  # the room must not be read
        return window

    def calls(self):
        """(operator, arguments, how many of the first results count) of every operator of the decoder but attention."""
        gamma = self.noise(self.outputs, scale=0.2) + 1
        residual, history = self.noise(*self.size, self.outputs), self.history()
        causal, double = self.kernel(self.outputs, 3, 3, 3), self.kernel(2 * self.channels, 3, 1, 1)
        return [
            ("open_window", lambda: (self.x, self.noise(self.channels, scale=0.2) + 1)),
            ("causal_step", lambda: (self.window(), history, *causal, residual, gamma)),
            ("causal_step", lambda: (self.window(), history, *causal, None, gamma)),
            ("causal_step", lambda: (self.window(), history, *causal, residual)),
            ("time_double", lambda: (self.x, self.history(0), *double)),
            ("upsample_conv", lambda: (self.x, *self.kernel(self.outputs, 3, 3))),
            ("pixel_conv", lambda: (self.window(), history, *self.kernel(3, 3, 3, 3))),
        ]


def wide(args):
    """The same arguments in float64."""
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def results(value, name: str) -> list[torch.Tensor]:
    """The tensors of an operator's result; of a window without its room."""
    if name == "open_window":
        return [value[:, PAST:]]
    if isinstance(value, tuple):
        return [v if i == 0 else v[:, PAST:] for i, v in enumerate(value) if v is not None]
    return [value]


def poison(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next results get, so that a value nobody wrote is seen."""
    dirty = [torch.full((n * like.numel(),), float("nan"), device="cuda", dtype=like.dtype) for n in (1, 1, 2, 3, 4)]
    del dirty


@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize("seed", range(DRAWS))
def test_operators(seed, backend):
    for name, make in Draw(seed).calls():
        function = ops.OPERATORS[name].backends.get(backend, (None,))[0]
        if function is None:
            continue
        args = make()
        truth = results(getattr(frames, name)(*wide(args)), name)
        plain = results(getattr(frames, name)(*args), name)
        poison(args[0])
        found = results(function(*args), name)
        assert len(found) == len(truth)
        for a, b, c in zip(found, truth, plain):
            assert bool(torch.isfinite(a).all())
            assert relative(a, b) <= TOLERANCE * max(relative(c, b), 1e-3), name


def test_attention():
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(3, 6240, 384, generator=generator, device="cuda").bfloat16() for _ in range(3))
    q = q * 3
    truth, plain = frames.frame_attention(q.double(), k.double(), v.double()), frames.frame_attention(q, k, v)
    name, function, _ = ops.frame_attention.choose(q, k, v)
    assert name == "matmul" and relative(function(q, k, v), truth) <= TOLERANCE * relative(plain, truth)


def test_a_call_repeats_bit_for_bit():
    for name, make in Draw(4).calls():
        args = make()
        expected = results(getattr(frames_fused, name)(*args), name)
        for _ in range(REPEATS):
            assert all(torch.equal(a, b) for a, b in zip(results(getattr(frames_fused, name)(*args), name), expected))


def networks(dim: int):
    """The same weights, exact in bfloat16: (bfloat16, float64)."""
    half = random_vae(dim).bfloat16()
    exact = random_vae(dim).double().to("cuda")
    exact.load_state_dict(half.state_dict())
    return half.to("cuda"), exact


def latents(frames_: int, height: int = 6, width: int = 10, batch: int = 1):
    generator = torch.Generator("cuda").manual_seed(frames_)
    return torch.randn(batch, 16, frames_, height, width, generator=generator, device="cuda").bfloat16()


@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize(("dim", "batch"), [(16, 2), (32, 1), (96, 1)])
def test_decoder_is_no_less_exact_than_plain_bfloat16(dim, batch, backend):
    half, exact = networks(dim)
    latent = latents(6, batch=batch)
    with ops.force("reference"):
        truth, plain = exact.decode(latent.double()), half.decode(latent)
    assert fused.stream_latents.choose(latent, half, WanCache())[0] == "triton"
    with ops.force(backend, "causal_step", "time_double", "upsample_conv"):
        found = half.decode(latent)
    assert found.dtype == torch.bfloat16 and bool(torch.isfinite(found).all())
    assert relative(found, truth) <= TOLERANCE * relative(plain, truth)


@pytest.mark.parametrize("parts", [(1,) * 12, (3, 9), (2, 1, 4, 5), (11, 1)])
def test_streamed_is_whole_bit_for_bit(parts, monkeypatch):
    """With our own convolutions a frame's bits depend neither on the partition nor on how many come at once."""
    half, _ = networks(96)
    latent = latents(sum(parts))
    with ops.force("triton", "causal_step", "time_double", "upsample_conv"):
        whole, cache = half.decode(latent), WanCache()
        assert torch.equal(torch.cat([half.decode(part, cache) for part in latent.split(parts, 2)], 2), whole)
        monkeypatch.setattr(fused, "GROUP", 3)
        assert torch.equal(half.decode(latent), whole)


def test_streamed_is_whole_with_cudnn_in_the_same_passes():
    half, _ = networks(96)
    latent = latents(13)
    with ops.force("cudnn", "causal_step", "time_double", "upsample_conv"):
        whole, cache = half.decode(latent), WanCache()
        pieces = [half.decode(part, cache) for part in latent.split((1, 4, 8), 2)]  # where the passes of a whole end
    assert torch.equal(torch.cat(pieces, 2), whole)


def test_film_stream_gives_the_bytes_of_one_decode():
    half, _ = networks(32)
    latent = latents(10)
    stream = WanStream(half)
    stream.start(None)
    pieces = torch.cat([piece for part in latent.split((4, 6), 2) for piece in to_cpu(stream.decode(part))])
    raw = stream._raw(latent)
    expected = (half.decode(raw)[0].movedim(0, -1).float().clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
    assert pieces.device.type == "cpu" and torch.equal(pieces, expected.cpu())


def test_the_decoder_leaves_torch_as_it_was():
    settings = lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,  # noqa: E731
                        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
    before, (half, _) = settings(), networks(32)
    for backend in ("triton", "cudnn"):
        with ops.force(backend, "causal_step"):
            half.decode(latents(3))
    assert settings() == before


def test_memory_stays_below_what_is_asked_for():
    half, _ = networks(96)
    latent = latents(9, 30, 52)
    for group in (1, 2, 4):
        fused.GROUP, before = group, fused.GROUP
        try:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            for _ in half.decode_stream(latent, WanCache()):
                pass
        finally:
            fused.GROUP = before
        weights = sum(p.numel() for p in half.decoder.parameters()) * 2
        assert torch.cuda.max_memory_allocated() - held < weights + fused.memory_needed(30, 52, group)


def test_training_uses_the_plain_decoder():
    with torch.inference_mode(False), torch.enable_grad():
        half = random_vae(16).bfloat16().to("cuda").requires_grad_(True)
        latent = latents(2).clone()
        half.decode(latent).float().square().mean().backward()
        assert half.decoder.conv1.weight.grad is not None
