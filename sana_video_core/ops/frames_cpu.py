"""The operators of ``frames.py`` on a CPU: oneDNN's convolutions on frames as they lie, channels last.

torch's own choice for one small video is its plain loop (one example, few rows): measured 3 to 15 times slower at the layers of
the embedded decoder, and norms over channels that lie far apart are another 10 times slower than here. Same meaning as the
reference, which runs where torch comes without oneDNN. Not covered: gradients, half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .frames import PAST, _channels_first
from .registry import Constraint


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """``x [B, (T,) H, W, C]``, weight ``[out, (time,) height, width, C]`` -> ``[B, (T',) H', W', out]``."""
    axes = x.ndim - 2
    ones = (1,) * axes  # stride and dilation
    y = torch.mkldnn_convolution(_channels_first(x), _channels_first(weight), bias, (padding,) * axes, ones, ones, 1)
    return y.movedim(1, -1)


def _full(window: Tensor, history: Tensor | None) -> Tensor:
    """The window with the frames before in its room."""
    if history is None:
        window[:, :PAST].zero_()
    else:
        window[:, :PAST] = history
    return window


def open_window(x: Tensor, gamma: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See :func:`.frames.open_window`."""
    if residual is not None:
        x = x + residual
    batch, frames, height, width, channels = x.shape
    window = x.new_zeros(batch, PAST + frames, height + 2, width + 2, channels)
    inner = window[:, PAST:, 1:-1, 1:-1]
    if gamma is None:
        inner.copy_(x)
        return window
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
    torch.mul(x / length, channels ** 0.5 * gamma, out=inner)
    F.silu(inner, inplace=True)
    return window


def causal_step(
    window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    gamma: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`.frames.causal_step`."""
    total = _convolution(_full(window, history), weight, bias)
    if residual is not None:
        total += residual
    return total.contiguous() if keep else None, None if gamma is None else open_window(total, gamma)


def time_double(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`.frames.time_double`."""
    before = x.new_zeros(x.shape[0], PAST, *x.shape[2:]) if history is None else history
    y = _convolution(torch.cat((before, x), 1), weight, bias)
    return y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2).contiguous()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`.frames.upsample_conv`."""
    doubled = x.flatten(0, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return _convolution(doubled, weight, bias, 1).unflatten(0, x.shape[:2]).contiguous()


def pixel_conv(window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`.frames.pixel_conv`."""
    return _channels_first(_convolution(_full(window, history), weight, bias)).contiguous()


def onednn_missing(*_, **__) -> str | None:
    """Reason why oneDNN cannot be used, or None; a ``check`` of any call."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available():
        return "this build of torch comes without oneDNN"
    return None if getattr(mkldnn, "enabled", True) else "oneDNN is switched off (torch.backends.mkldnn)"


def register(operators: dict) -> None:
    """Add the backends to the operators of those names."""
    here = Constraint(devices=("cpu",), dtypes=(torch.float32,), inference_only=True, check=onednn_missing)
    for function in (open_window, causal_step, time_double, upsample_conv, pixel_conv):
        operators[function.__name__].add("onednn", function, here)
