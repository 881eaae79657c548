"""The operators of ``frames.py`` on a CUDA card: Triton kernels, or cuDNN's convolutions with what follows them in Triton.

Same meaning as the reference; a call outside what :func:`register` declares runs that. Between two convolutions of the decoder
there is one pass over memory (residual, norm, SiLU, border, and what two frames at a time read). No global of torch is touched:
cuDNN is called directly, with its options as arguments.
Not covered: gradients (the reference runs).
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .frames import PAST
from .fused import _row
from .fused_torch import one_dtype
from .pairs import narrow
from .registry import Constraint, capability

# Launch settings. Convolution, by output channels of a program: (pixels, input channels a step, warps, stages, most registers
# a thread or None): two programs fit a multiprocessor, so that one computes while the other writes; by the compiler's report
# no register is spilled in the loop. Window: (values, warps); gather: (pixels, warps).
CONVOLUTION = {192: (128, 32, 8, 4, 128), 128: (128, 64, 8, 3, 128), 96: (256, 32, 8, 4, 128), 64: (128, 64, 4, 3, None),
               0: (128, 32, 4, 3, None)}
# Elsewhere than on Hopper there is less shared memory, and a product's operands go through registers.
CONVOLUTION_SMALLER = {192: (128, 32, 8, 3, None), 128: (128, 64, 8, 2, 128), 96: (128, 32, 8, 3, 128),
                       0: (128, 32, 4, 3, None)}
# The same for the convolution of two frames at a time, whose two accumulators leave no registers for a product's operands: it
# is for Hopper, where these come from shared memory.
PAIR_CONVOLUTION = {192: (128, 32, 8, 4, 255), 96: (64, 32, 4, 4, 168), 0: (64, 32, 4, 3, None)}
WINDOW, PAIRS, GATHER = (4096, 4), (1024, 4), (256, 4)
# cuDNN's search for the fastest algorithm. Off: its choice then depends on the shape alone, so that a run repeats.
CUDNN_SEARCH = False
SCORES = 2048  # rows of attention scores at one time


def _kernels(name: str):
    return import_module(f".{name}", __package__)


def _columns(channels: int) -> int:
    """Output channels of a program: the most that divide ``channels`` and are a power of two, or that and its half."""
    return next(n for n in (192, 128, 96, 64, 48, 32, 16) if channels % n == 0)


def _hopper(x: Tensor) -> bool:
    return x.is_cuda and capability(x.device)[0] == 9


def _setting(columns: int, cin: int, table: dict) -> tuple[int, int, dict[str, int]]:
    """(pixels, input channels a step, launch options) of a program of a convolution."""
    rows, step, warps, stages, registers = table.get(columns, table[0])
    options = {"num_warps": warps, "num_stages": stages}
    return rows, min(step, cin & -cin), options if registers is None else {**options, "maxnreg": registers}


def _launch(form: str, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor,
            size: tuple[int, int, int]) -> None:
    """Run the convolution kernel into ``out``; ``size``: (frames, height, width) of x without room and border."""
    kernels = _kernels("kernels_conv")
    frames, height, width = size
    number, cin = getattr(kernels, form), weight.shape[-1]
    up, causal = number == kernels.UP, number == kernels.CAUSAL
    cout = weight.shape[1 if up else 0]
    columns = _columns(cout // 2 if number == kernels.TIME else cout)
    main = 1 << (columns.bit_length() - 1)
    rows, step, options = _setting(columns, cin, CONVOLUTION if _hopper(x) else CONVOLUTION_SMALLER)
    tiles = -(-height * (width + 2 * causal) // rows)
    grid = (tiles * frames * (cout // columns) * (4 if up else 1), x.shape[0])
    given = (x if history is None else history, weight, bias)  # what is not there is not touched
    with torch.cuda.device_of(x):
        kernels.frame_conv_kernel[grid](
            x, *given, out, frames, height, width, int(history is None), FORM=number, CIN=cin, COUT=cout,
            OPERAND=kernels.operand(x.dtype), ROWS=rows, MAIN=main, REST=columns - main, BLOCK_K=step, **options)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=x.device, dtype=x.dtype)


def _pass(x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None, keep: bool,
          window: bool) -> tuple[Tensor | None, Tensor | None]:
    """(``x + bias + residual`` if ``keep``, which overwrites x; its window if wanted) in one pass; the window's room stays
    unwritten."""
    batch, frames, height, width, channels = x.shape
    opened = _empty(x, batch, PAST + frames, height + 2, width + 2, channels) if window else None
    values, warps = WINDOW
    pixels = max(8, values >> (channels - 1).bit_length())
    given = (x if t is None else t for t in (bias, residual, gamma, x, opened))
    with torch.cuda.device_of(x):
        _kernels("kernels_frames").window_kernel[(-(-width // pixels), height + 2, batch * frames)](
            x, *given, frames, height, width, **_row(channels), PIXELS=pixels, ROOT=float(channels) ** 0.5,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, KEEP=keep, OPEN=window, NORM=gamma is not None,
            FORM=_kernels("kernels_silu").silu_form("single"), num_warps=warps)
    return x if keep else None, opened


def open_window(x: Tensor, gamma: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """See ``frames.open_window``; one read, one write. The room is not written."""
    return _pass(x, None, residual, gamma, False, True)[1]


def causal_step(
    window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    gamma: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """See ``frames.causal_step``; Triton's convolution, and one pass for the rest: within it the kernel runs out of registers."""
    batch, depth, height, width, _ = window.shape
    size = depth - PAST, height - 2, width - 2
    out = _empty(window, batch, *size, len(weight))
    _launch("CAUSAL", window, history, weight, bias, out, size)
    if residual is None and gamma is None:
        return out if keep else None, None
    return _pass(out, None, residual, gamma, keep, gamma is not None)


def open_pairs(
    x: Tensor, history: Tensor | None, gamma: Tensor, residual: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """See ``frames.open_pairs``; one pass, and the total goes where x was."""
    batch, frames, height, width, channels = x.shape
    sums = torch.empty(batch, frames // 2, 4, height + 2, width + 2, channels, device=x.device, dtype=narrow(x.dtype))
    last = _empty(x, batch, PAST, height + 2, width + 2, channels)
    block, (values, warps) = 1 << (channels - 1).bit_length(), PAIRS
    pixels = max(1, values // block)
    given = (x if t is None else t for t in (residual, gamma, history))
    with torch.cuda.device_of(x):
        _kernels("kernels_frames").pairs_kernel[(-(-(width + 2) // pixels), height + 2, batch)](
            x, *given, sums, last, frames, height, width, C=channels, BLOCK_C=block, PIXELS=pixels, ROOT=float(channels) ** 0.5,
            HAS_RESIDUAL=residual is not None, KEEP=keep, HAS_HISTORY=history is not None,
            FORM=_kernels("kernels_silu").silu_form("single"), num_warps=warps)
    return x if keep else None, sums, last


def pair_conv(sums: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.pair_conv``; two frames a program."""
    kernels, (batch, pairs, _, height, width, cin), cout = _kernels("kernels_conv"), sums.shape, weights.shape[1]
    columns = _columns(cout)
    main = 1 << (columns.bit_length() - 1)
    rows, step, options = _setting(columns, cin, PAIR_CONVOLUTION)
    height, width = height - 2, width - 2
    out = _empty(bias, batch, 2 * pairs, height, width, cout)
    grid = (-(-height * (width + 2) // rows) * pairs * (cout // columns), batch)
    with torch.cuda.device_of(sums):
        kernels.pair_conv_kernel[grid](
            sums, weights, bias, out, pairs, height, width, CIN=cin, COUT=cout, OPERAND=kernels.operand(sums.dtype), ROWS=rows,
            MAIN=main, REST=columns - main, BLOCK_K=step, **options)
    return out


def time_double(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.time_double``; the frames come out in order."""
    batch, frames, height, width, channels = x.shape
    out = _empty(x, batch, 2 * frames, height, width, channels)
    _launch("TIME", x, history, weight, bias, out, (frames, height, width))
    return out


def _folded(weight: Tensor, axis: int) -> Tensor:
    """Three taps along ``axis`` to the two that are left for the first and for the second of two equal pixels, in front."""
    a, b, c = weight.unbind(axis)
    return torch.stack((torch.stack((a, b + c), axis), torch.stack((a + b, c), axis)))


def _four_kernels(weight: Tensor) -> Tensor:
    """3x3 weights ``[out, 3, 3, in]`` to those of the four pixels made of one, ``[4, out, 2, 2, in]``.

    Two of the three taps of a side fall on the same pixel before it was doubled; their weights add up (float32).
    """
    four = _folded(_folded(weight.float(), 1), 3)  # column, row, out, 2, 2, in
    return four.transpose(0, 1).flatten(0, 1).to(weight.dtype).contiguous()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.upsample_conv``; nothing is written four times, and four products stand for nine."""
    batch, frames, height, width, _ = x.shape
    out = _empty(x, batch, frames, 2 * height, 2 * width, weight.shape[0])
    _launch("UP", x, None, _four_kernels(weight), bias, out, (frames, height, width))
    return out


def _filled(window: Tensor, history: Tensor | None) -> Tensor:
    """The window with the history in its room."""
    if history is None:
        window[:, :PAST].zero_()
    else:
        window[:, :PAST].copy_(history)
    return window


def pixel_conv(window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.pixel_conv``. So few outputs leave a convolution's tile empty, which would read every pixel 27 times.

    One matrix product makes all taps of every pixel, and a second pass adds them up where they belong.
    """
    batch, depth, height, width, channels = _filled(window, history).shape
    outputs, frames, height, width = weight.shape[0], depth - PAST, height - 2, width - 2
    rows = 27 * outputs
    taps = weight.new_zeros(-(-rows // 8) * 8, channels)  # the product wants multiples of 16 bytes
    taps[:rows] = weight.movedim(0, 3).reshape(rows, channels)
    # Frame by frame: a product of one size has one order of summing, whatever the number of frames.
    plane = (height + 2) * (width + 2)
    products = _empty(window, batch * depth, len(taps), -(-plane // 8) * 8)
    # The last pixels are border, all zeros: left out where the product's width is then one of the aligned ones, which have
    # better kernels.
    even = plane - plane % 8 if plane % 8 <= width + 2 else plane
    products[:, :, even:].zero_()
    for frame, goal in zip(window.flatten(0, 1).flatten(1, 2), products):
        torch.mm(taps, frame[:even].t(), out=goal[:, :even])
    out = _empty(window, batch, outputs, frames, height, width)
    pixels, warps = GATHER
    with torch.cuda.device_of(window):
        _kernels("kernels_frames").gather_taps_kernel[(-(-width // pixels), height, batch * frames)](
            products, bias, out, frames, height, width, products.shape[2], ROWS=len(taps), OUT=outputs, PIXELS=pixels,
            num_warps=warps)
    return out


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See ``frames.frame_attention``: float32 scores by matrix products, some rows at a time.

    torch's fused attention ends at heads of 256 channels; what runs above is far from a matrix product's speed.
    """
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    for one, keys, values, goal in zip(q, k, v, out):
        for rows, target in zip(one.split(SCORES), goal.split(SCORES)):
            scores = torch.mm(rows, keys.t(), out_dtype=torch.float32).mul_(scale)
            torch.mm(torch.softmax(scores, -1).to(q.dtype), values, out=target)
    return out


def _cudnn(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """cuDNN's convolution without bias of channels-last ``x``; the result is channels last too."""
    first = torch.cudnn_convolution(
        x.movedim(-1, 1), weight.movedim(-1, 1), padding, (1,) * len(padding), (1,) * len(padding), 1,
        benchmark=CUDNN_SEARCH, deterministic=False, allow_tf32=True)
    return first.movedim(1, -1).contiguous()


def cudnn_causal_step(
    window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    gamma: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """See ``frames.causal_step``; cuDNN's convolution over the filled window, one pass after it."""
    if history is None and window.shape[1] == PAST + 1:  # a video's first frame: zeros before it
        y = _cudnn(window[:, PAST:], weight[:, PAST:].contiguous(), (0, 0, 0))
    else:
        y = _cudnn(_filled(window, history), weight, (0, 0, 0))
    return _pass(y, bias, residual, gamma, keep, gamma is not None)


def cudnn_time_double(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.time_double``."""
    before = x.new_zeros(x.shape[0], PAST, *x.shape[2:]) if history is None else history
    y = _cudnn(torch.cat((before, x), 1), weight, (0, 0, 0)).unflatten(-1, (2, -1))
    out = _empty(x, x.shape[0], x.shape[1], 2, *x.shape[2:])
    torch.add(y.movedim(-2, 2), bias.view(2, 1, 1, -1), out=out)
    return out.flatten(1, 2)


def cudnn_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``frames.upsample_conv``."""
    batch, frames, height, width, channels = x.shape
    large = x.flatten(0, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(-1, 2 * height, 2 * width, channels)
    return _cudnn(large, weight, (1, 1)).add_(bias).unflatten(0, (batch, frames))


def _regular(*tensors: Tensor | None) -> str | None:
    """Reason to refuse frames with gaps, several dtypes, or channels that do not fill a product's smallest side."""
    given = [t for t in tensors if t is not None]
    odd = next((t for t in given if t.shape[-1] % 16), None)
    if odd is not None:
        return f"needs channels in multiples of 16, found {odd.shape[-1]}"
    if not all(t.is_contiguous() for t in given):
        return "needs contiguous frames"
    return one_dtype(*given)


def _window_of(x, gamma=None, residual=None) -> str | None:
    return _regular(x, gamma, residual)


def _pairs_of(x, history, gamma, residual=None, keep=False) -> str | None:
    return _regular(x, history, gamma, residual)


def _pair_step(sums, weights, bias) -> str | None:
    return _regular(sums, weights)


def _step(window, history, weight, bias, residual=None, gamma=None, keep=True) -> str | None:
    return _regular(window, history, weight, bias, residual, gamma)


def _plain(x, *others) -> str | None:
    return _regular(x, *others)


def _pixels(window, history, weight, bias) -> str | None:
    return _regular(window, history, weight) or one_dtype(window, bias)


def _attention(q, k, v) -> str | None:
    if "dtype" not in torch.ops.aten.mm.overloads():
        return "needs matrix products with float32 results (torch 2.8)"
    return _regular(q, k, v)


def register(operators: dict) -> None:
    """Add these functions to the operators: 'triton', then 'cudnn' where it has a convolution of its own."""
    needs = {"devices": ("cuda",), "inference_only": True, "triton": True, "capability": (8, 0), "dtypes": (torch.bfloat16,)}
    ways = {open_window: _window_of, causal_step: _step, time_double: _plain, upsample_conv: _plain, pixel_conv: _pixels}
    for function, check in ways.items():
        operators[function.__name__].add("triton", function, Constraint(**needs, check=check))
    hopper = needs | {"generation": 9}
    operators["open_pairs"].add("triton", open_pairs, Constraint(**hopper, check=_pairs_of))
    operators["pair_conv"].add("triton", pair_conv, Constraint(**hopper | {"dtypes": (torch.float16,)}, check=_pair_step))
    for function in (cudnn_causal_step, cudnn_time_double, cudnn_upsample_conv):
        name = function.__name__.removeprefix("cudnn_")
        operators[name].add("cudnn", function, Constraint(**needs, check=ways[globals()[name]]))
    card = {"devices": ("cuda",), "inference_only": True, "dtypes": (torch.bfloat16,)}
    operators["frame_attention"].add("matmul", frame_attention, Constraint(**card, check=_attention))
