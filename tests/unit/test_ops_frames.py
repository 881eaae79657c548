"""The video decoder's operators in Triton's interpreter on the CPU: values at awkward sizes, and nothing left unwritten."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from kernelcases import poisoned_memory  # noqa: F401  (a fixture)

from sana_video_core import ops
from sana_video_core.ops import frames, frames_fused
from sana_video_core.ops.frames import PAST
from sana_video_core.vae import fused
from wanvae import random_vae, relative

CASES = 5


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several programs a frame at sizes that the interpreter can do, the last of them partly empty."""
    monkeypatch.setattr(frames_fused, "CONVOLUTION_SMALLER", {0: (16, 32, 4, 2, None)})
    monkeypatch.setattr(frames_fused, "PAIR_CONVOLUTION", {0: (16, 32, 4, 2, None)})
    monkeypatch.setattr(frames_fused, "WINDOW", (64, 4))
    monkeypatch.setattr(frames_fused, "PAIRS", (64, 4))
    monkeypatch.setattr(frames_fused, "GATHER", (4, 4))


class Case:
    """Random frames of a random awkward size; every third in bfloat16."""

    def __init__(self, seed: int):
        pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = torch.bfloat16 if seed % 3 == 2 else torch.float32
        self.size = pick.randint(1, 2), pick.randint(1, 3), pick.randint(1, 4), pick.randint(1, 11)
        self.channels, self.outputs = pick.choice((16, 32, 48)), pick.choice((16, 48, 80, 96))
        self.x = self.noise(*self.size, self.channels)

    def noise(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def kernel(self, outputs: int, *taps: int):
        scale = (torch.Size(taps).numel() * self.channels) ** -0.5
        return self.noise(outputs, *taps, self.channels, scale=scale), self.noise(outputs, scale=0.3)

    def history(self, begins: bool):
        batch, _, height, width = self.size
        return None if begins else F.pad(self.noise(batch, PAST, height, width, self.channels), (0, 0, 1, 1, 1, 1))

    def window(self):
        """A window whose room must not be read."""
        window = frames.open_window(self.x)
        window[:, :PAST] = float("nan")
        return window


def wide(*args):
    return [a.float() if isinstance(a, torch.Tensor) else a for a in args]


def close(found, expected, dtype=None) -> None:
    """The interpreter cuts a bfloat16 instead of rounding it. ``dtype``: of the model, where it is not found's."""
    assert found.shape == expected.shape and found.is_contiguous() and bool(torch.isfinite(found).all())
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error < (8e-3 if (dtype or found.dtype) == torch.bfloat16 else 2e-6)


def close_windows(found, expected) -> None:
    close(found[:, PAST:].contiguous(), expected[:, PAST:])
    border = torch.ones_like(found[:, PAST:], dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    assert not found[:, PAST:][border].any()


@pytest.mark.parametrize("seed", range(CASES))
def test_open_window(seed):
    case = Case(seed)
    gamma = case.noise(case.channels, scale=0.2) + 1
    close_windows(frames_fused.open_window(case.x, gamma), frames.open_window(*wide(case.x, gamma)))
    assert torch.equal(frames_fused.open_window(case.x)[:, PAST:], frames.open_window(case.x)[:, PAST:])


def test_norm_of_nothing_is_nothing():
    """A pixel of zeros has no direction: torch's normalize gives zeros, not NaN."""
    assert not frames_fused.open_window(torch.zeros(1, 1, 2, 3, 16), torch.ones(16))[:, PAST:].any()


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_causal_step(seed, begins):
    case = Case(seed)
    weight, bias = case.kernel(case.outputs, 3, 3, 3)
    gamma, residual = case.noise(case.outputs, scale=0.2) + 1, case.noise(*case.size, case.outputs)
    window, history = case.window(), case.history(begins)
    for more, keep in (({"residual": residual, "gamma": gamma}, True), ({"residual": residual}, True), ({"gamma": gamma}, False)):
        total, opened = frames_fused.causal_step(window, history, weight, bias, **more, keep=keep)
        truth, wanted = frames.causal_step(*wide(window, history, weight, bias), **dict(zip(more, wide(*more.values()))))
        assert (total is not None) == keep and (opened is not None) == ("gamma" in more)
        if keep:
            close(total, truth)
        if opened is not None:
            close_windows(opened, wanted)


@pytest.mark.parametrize("seed", range(CASES))
def test_frames_do_not_depend_on_how_many_come_at_once(seed):
    """The bits of a frame are the same in a group and alone, with the frames before it as history."""
    case = Case(3 * seed)
    weight, bias = case.kernel(case.outputs, 3, 3, 3)
    gamma = case.noise(case.outputs) + 1
    window = case.window()
    whole = frames_fused.causal_step(window, None, weight, bias, gamma=gamma)
    history = torch.zeros_like(window[:, :PAST])
    for t in range(case.size[1]):
        one = window[:, t:t + PAST + 1].contiguous()
        total, opened = frames_fused.causal_step(one, history, weight, bias, gamma=gamma)
        assert torch.equal(total, whole[0][:, t:t + 1]) and torch.equal(opened[:, PAST:], whole[1][:, PAST + t:PAST + t + 1])
        history = torch.cat((history[:, 1:], one[:, PAST:]), 1)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_two_frames_at_a_time(seed, begins):
    """Both steps against their references, and together against the convolution of every frame by itself."""
    case = Case(seed)
    x = torch.cat((case.x, case.noise(*case.size, case.channels)), 1)
    gamma, history, residual = case.noise(case.channels, scale=0.2) + 1, case.history(begins), case.noise(*x.shape)
    for more in (None, residual):
        total, sums, last = frames_fused.open_pairs(x.clone(), history, gamma, more, more is not None)
        truth, wanted, latest = frames.open_pairs(*wide(x, history, gamma, more), more is not None)
        close(sums, wanted, x.dtype)
        close(last, latest)
        assert (total is None) == (more is None)
        if more is not None:
            close(total, truth)
    weight, bias = case.kernel(case.outputs, 3, 3, 3)
    weights = frames.frame_weights(weight)
    close(frames_fused.pair_conv(sums, weights, bias), frames.pair_conv(*wide(sums, weights, bias)))
    window = frames.open_window(*wide(x, gamma, residual))
    expected, _ = frames.causal_step(window, None if history is None else history.float(), *wide(weight, bias))
    close(frames.pair_conv(wanted, frames.frame_weights(weight.float()), bias.float()), expected, torch.bfloat16)


def test_two_frames_at_a_time_in_bfloat16_are_as_exact_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    window = F.silu(torch.randn(1, 6, 8, 9, 32, generator=generator)).bfloat16()
    weight, bias = (torch.randn(32, 3, 3, 3, 32, generator=generator) / 29).bfloat16(), torch.zeros(32).bfloat16()
    d0, d1, d2, d3 = (window.float()[:, i:i + 4:2] for i in range(4))
    sums = torch.stack((d0 - d2, d1 + d2, d2 - d1, d1 - d3), 2).half()
    truth = frames.causal_step(window.double(), window[:, :PAST].double(), weight.double(), bias.double())[0]
    plain = frames.causal_step(window.float(), window[:, :PAST].float(), weight.float(), bias.float())[0].bfloat16()
    found = frames.pair_conv(sums, frames.frame_weights(weight), bias)
    assert relative(found.double(), truth) < 1.2 * relative(plain.double(), truth)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_time_double(seed, begins):
    case = Case(seed)
    weight, bias = case.kernel(2 * case.channels, 3, 1, 1)
    batch, _, height, width = case.size
    history = None if begins else case.noise(batch, PAST, height, width, case.channels)
    close(frames_fused.time_double(case.x, history, weight, bias), frames.time_double(*wide(case.x, history, weight, bias)))


@pytest.mark.parametrize("seed", range(CASES))
def test_upsample_conv(seed):
    case = Case(seed)
    weight, bias = case.kernel(case.outputs, 3, 3)
    close(frames_fused.upsample_conv(case.x, weight, bias), frames.upsample_conv(*wide(case.x, weight, bias)))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_pixel_conv(seed, begins):
    case = Case(seed)
    weight, bias = case.kernel(3 if seed % 2 else 4, 3, 3, 3)
    history = case.history(begins)
    close(frames_fused.pixel_conv(case.window(), history, weight, bias),
          frames.pixel_conv(*wide(case.window(), history, weight, bias)))


def fake_cudnn(x, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32):
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    return convolve(x, weight, None, stride, padding, dilation, groups)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_operators_around_cudnn(seed, begins, monkeypatch):
    """All but cuDNN itself: room filled with the history, bias and residual and norm in the pass after it."""
    monkeypatch.setattr(torch, "cudnn_convolution", fake_cudnn)
    case = Case(seed)
    weight, bias = case.kernel(case.outputs, 3, 3, 3)
    gamma, residual = case.noise(case.outputs, scale=0.2) + 1, case.noise(*case.size, case.outputs)
    history = case.history(begins)
    total, opened = frames_fused.cudnn_causal_step(case.window(), history, weight, bias, residual, gamma)
    truth, wanted = frames.causal_step(*wide(case.window(), history, weight, bias, residual, gamma))
    close(total, truth)
    close_windows(opened, wanted)
    assert frames_fused.cudnn_causal_step(case.window(), history, weight, bias, keep=False) == (None, None)
    weight, bias = case.kernel(case.outputs, 3, 3)
    close(frames_fused.cudnn_upsample_conv(case.x, weight, bias), frames.upsample_conv(*wide(case.x, weight, bias)))
    weight, bias = case.kernel(2 * case.channels, 3, 1, 1)
    before = None if history is None else history[:, :, 1:-1, 1:-1].contiguous()
    close(frames_fused.cudnn_time_double(case.x, before, weight, bias),
          frames.time_double(*wide(case.x, before, weight, bias)))


def test_attention_of_more_rows_than_are_scored_at_once(monkeypatch):
    """The float32 results of bfloat16 products exist on a card only; here all is float32."""
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None, out_dtype=None: mm(a, b, out=out))
    monkeypatch.setattr(frames_fused, "SCORES", 5)
    q, k, v = (torch.randn(3, 13, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    close(frames_fused.frame_attention(q, k, v), frames.frame_attention(q, k, v))


def test_refusals_have_reasons():
    backends = ops.OPERATORS["causal_step"].backends
    assert list(backends) == ["triton", "cudnn", "onednn"]
    window, weight, bias = torch.zeros(1, 3, 4, 4, 16), torch.zeros(16, 3, 3, 3, 16), torch.zeros(16)
    for _, constraint in (backends["triton"], backends["cudnn"]):
        assert constraint.check(window, None, weight, bias) is None
        assert "multiples of 16" in constraint.check(torch.zeros(1, 3, 4, 4, 8), None, weight, bias)
        assert "contiguous" in constraint.check(window.transpose(2, 3), None, weight, bias)
        assert "one dtype" in constraint.check(window, None, weight.half(), bias)
    name, _, reasons = ops.causal_step.choose(window, None, weight, bias)
    assert name == "onednn" and "on cpu" in reasons["cudnn"]


def test_decoder_of_kernels_alone(monkeypatch):
    """Every operator of the decoder in the interpreter, on a video of two latent pixels, equals the plain decoder."""
    for name in ("open_window", "causal_step", "open_pairs", "pair_conv", "time_double", "upsample_conv", "pixel_conv",
                 "stream_latents"):
        backends = ops.OPERATORS[name].backends
        function, constraint = backends["triton"]
        monkeypatch.setitem(backends, "triton", (function, dataclasses.replace(
            constraint, devices=("cpu",), dtypes=(torch.float32,), triton=False)))
    monkeypatch.setattr(fused, "_free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(frames_fused, "CONVOLUTION_SMALLER", {0: (128, 32, 4, 2, None)})
    monkeypatch.setattr(frames_fused, "PAIR_CONVOLUTION", {0: (128, 32, 4, 2, None)})
    vae = random_vae()
    latent = torch.randn(1, 16, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    with ops.force("reference"):
        expected = vae.decode(latent)
    seen = []
    real = frames_fused._launch
    monkeypatch.setattr(frames_fused, "_launch", lambda form, *a: (seen.append(form), real(form, *a)))
    function, constraint = ops.pair_conv.backends["triton"]
    monkeypatch.setitem(ops.pair_conv.backends, "triton", (lambda *a: (seen.append("PAIR"), function(*a))[1], constraint))
    found = vae.decode(latent)
    assert relative(found, expected) < 2e-5 and [seen.count(n) for n in ("CAUSAL", "PAIR", "TIME", "UP")] == [40, 18, 2, 6]
