"""The video decoder's operators by oneDNN: the reference's values at awkward sizes, and nothing left unwritten or overwritten."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sana_video_core import ops
from sana_video_core.ops import frames, frames_cpu
from sana_video_core.ops.frames import PAST

CASES = 20


class Case:
    """Random frames of a random awkward size, in double precision for the truth."""

    def __init__(self, seed: int):
        pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.size = pick.randint(1, 2), pick.randint(1, 4), pick.randint(1, 9), pick.randint(1, 11)
        self.channels, self.outputs = pick.choice((1, 3, 12, 16, 24)), pick.choice((2, 3, 12, 20, 48))
        self.x = self.noise(*self.size, self.channels)

    def noise(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def kernel(self, outputs: int, *taps: int):
        return self.noise(outputs, *taps, self.channels), self.noise(outputs)

    def history(self, begins: bool):
        batch, _, height, width = self.size
        return None if begins else F.pad(self.noise(batch, PAST, height, width, self.channels), (0, 0, 1, 1, 1, 1))

    def window(self):
        """A window whose room must not be read."""
        window = frames.open_window(self.x)
        window[:, :PAST] = float("nan")
        return window


def same(function: str, *args, **kwargs) -> None:
    """oneDNN is chosen, gives what the reference gives in double precision, and changes no input but a window's room."""
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    before = [a.clone() for a in inputs]
    name, backend, _ = ops.OPERATORS[function].choose(*args, **kwargs)
    assert name == "onednn" and backend is getattr(frames_cpu, function)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    expected = getattr(frames, function)(*wide, **kwargs)
    found = backend(*args, **kwargs)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.is_contiguous() and a.dtype == torch.float32
            if function == "causal_step" and a.shape[1] == args[0].shape[1]:  # the next window: its room is free
                a, b = a[:, PAST:], b[:, PAST:]
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)
    for now, was in zip(inputs, before):
        if was.isnan().any():  # a window
            now, was = now[:, PAST:], was[:, PAST:]
        assert torch.equal(now, was)


@pytest.mark.parametrize("seed", range(CASES))
def test_open_window(seed):
    case = Case(seed)
    same("open_window", case.x)
    same("open_window", case.x, case.noise(case.channels))
    same("open_window", case.x.transpose(2, 3), case.noise(case.channels))  # not contiguous
    assert bool(frames_cpu.open_window(torch.zeros(1, 1, 2, 3, 4), torch.ones(4)).eq(0).all())


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_causal_step(seed, begins):
    case = Case(seed)
    kernel = case.kernel(case.outputs, 3, 3, 3)
    same("causal_step", case.window(), case.history(begins), *kernel)
    residual, gamma = case.noise(*case.size, case.outputs), case.noise(case.outputs)
    same("causal_step", case.window(), case.history(begins), *kernel, residual, gamma)
    same("causal_step", case.window(), case.history(begins), *kernel, None, gamma, keep=False)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("seed", range(CASES))
def test_last_convolution_and_more_frames_and_pixels(seed, begins):
    case = Case(seed)
    same("pixel_conv", case.window(), case.history(begins), *case.kernel(3, 3, 3, 3))
    history = None if begins else case.noise(case.size[0], PAST, *case.size[2:], case.channels)
    same("time_double", case.x, history, *case.kernel(2 * case.channels, 3, 1, 1))
    same("upsample_conv", case.x, *case.kernel(case.outputs, 3, 3))


@pytest.mark.filterwarnings("ignore:TF32")
def test_what_it_cannot_do_is_left_to_the_reference(monkeypatch):
    x = torch.randn(1, 1, 2, 2, 4)
    for other in (x.double(), x.bfloat16(), x.clone().requires_grad_()):
        assert ops.open_window.choose(other)[0] == "reference"
    with torch.backends.mkldnn.flags(enabled=False):
        name, _, reasons = ops.open_window.choose(x)
        assert name == "reference" and "switched off" in reasons["onednn"]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in ops.open_window.choose(x)[2]["onednn"]
