"""ComfyUI's fp8 layers with inputs that are scaled by their own largest values.

Where a file has no calibrated ``input_scale``, core's layer casts its input to E4M3 as it is and cuts what lies beyond 448
(comfyui spec 5.2). Hidden layers and attention have no such bound, so here every such input gets scales of its own: one a row,
made in one pass over it (``ops.row_fp8``), where the device multiplies such rows; else one for all of it, in two passes
(``ops.scaled_fp8``), and core's layer gets the finished tensor. Needs ComfyUI inside the functions only.
"""

from __future__ import annotations

import functools
import logging

import torch

from ..sana_video_core import ops

FORMAT = "float8_e4m3fn"
log = logging.getLogger(__name__)


def with_scaled_inputs(operations):
    """The layer classes of core's mixed precision with such an fp8 Linear; other ones as they are."""
    if not hasattr(operations, "_quant_config"):
        return operations

    class Linear(operations.Linear):
        def takes_rows(self, x) -> bool:
            """Whether inputs like ``x`` may come as ``ops.Rows``, scaled by what made them."""
            return by_row(x) and takes_scaled_input(self, x)

        def forward(self, input, *args, **kwargs):
            dtype = torch.bfloat16
            if not isinstance(input, ops.Rows):
                if not takes_scaled_input(self, input):
                    return super().forward(input, *args, **kwargs)
                dtype, input = input.dtype, (ops.row_fp8 if by_row(input) else ops.scaled_fp8)(input)
            values, scale = input
            rows = quantised(values, scale, self.layout_type, dtype)
            return super().forward(rows, *args, **kwargs).reshape(*values.shape[:-1], -1)

        def _forward(self, input, weight, bias):
            scale = getattr(getattr(input, "_params", None), "scale", None)
            if scale is None or scale.ndim != 2:
                return super()._forward(input, weight, bias)
            return row_product(input._qdata, scale, weight._qdata, weight._params.scale, bias, input._params.orig_dtype)

    return type(operations.__name__, (operations,), {"Linear": Linear})


def by_row(x) -> bool:
    """Whether inputs like ``x`` get a scale a row: :func:`row_product` takes them, and gives bfloat16."""
    return x.dtype == torch.bfloat16 and multiplies_rows(x.device)


def takes_scaled_input(layer, x) -> bool:
    """Whether core would multiply ``x`` in E4M3 as it is: the layer's format and options, no LoRA, no scale, no training."""
    from comfy.quant_ops import QuantizedTensor

    return (
        getattr(layer, "quant_format", None) == FORMAT and not layer._full_precision_mm
        and getattr(layer, "input_scale", None) is None and getattr(layer, "pre_quant_scale", None) is None
        and not isinstance(x, QuantizedTensor) and not x.requires_grad
        and not getattr(layer, "comfy_force_cast_weights", False) and not layer.weight_function and not layer.bias_function)


def quantised(values, scale, layout: str, dtype):
    """E4M3 values ``[..., C]`` with a scale for all or ``[..., 1]`` as core's matrix ``[N, C]``, of a tensor of ``dtype``."""
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    values, scale = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1) if scale.ndim else scale
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(values.shape))
    return QuantizedTensor(values, layout, params)


def row_product(x, x_scale, weight, weight_scale, bias, dtype):
    """``(x * x_scale) (weight * weight_scale)^T + bias``: E4M3 ``x [N, C]``, ``weight [M, C]``, scales ``[N, 1]`` and ``[]``."""
    columns = weight_scale.float().reshape(1, 1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(x.contiguous(), weight.t(), x_scale, columns, bias=bias, out_dtype=dtype, use_fast_accum=True)


@torch.compiler.assume_constant_result
@functools.cache
def multiplies_rows(device: torch.device) -> bool:
    """Whether torch multiplies E4M3 with a scale a row there (it depends on card, torch and system): a small product tells."""
    if device.type != "cuda":
        return False
    x, scale = torch.ones(16, 32, device=device).to(torch.float8_e4m3fn), torch.full((16, 1), 2.0, device=device)
    try:
        found = row_product(x, scale, x, torch.ones((), device=device), None, torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.info("fp8 with one scale for all rows: this device has no product with a scale a row (%s)", str(error)[:120])
        return False
    return bool((found == 64).all())
