"""ComfyUI's fp8 layers with inputs that come scaled, or are scaled by their own largest values.

Where a file has a calibrated ``input_scale``, what makes the input writes it in E4M3 at that scale, and core's layer gets the
finished tensor. Where it has none, core's layer casts its input to E4M3 as it is and cuts what lies beyond 448 (comfyui spec
5.2). Hidden layers and attention have no such bound, so here every such input gets scales of its own: one a row, made in one
pass over it (``ops.row_fp8``), where the device multiplies such rows; else one for all of it, in two passes
(``ops.scaled_fp8``). Needs ComfyUI inside the functions only.
"""

from __future__ import annotations

import functools
import logging
import weakref

import torch

from ..sana_video_core import ops
from ..sana_video_core.quant.calibrate import SPREAD, Seen, watched

FORMAT = "float8_e4m3fn"
log = logging.getLogger(__name__)


def with_scaled_inputs(operations):
    """The layer classes of core's mixed precision with such an fp8 Linear; other ones as they are."""
    if not hasattr(operations, "_quant_config"):
        return operations

    class Linear(operations.Linear):
        def takes_rows(self, x) -> bool:
            """Whether inputs like ``x`` may come as ``ops.Rows``, scaled by what made them: at the layer's scale or by row."""
            if getattr(self, "input_scale", None) is not None:
                return x.dtype == torch.bfloat16 and multiplies(self, x) and not torch.compiler.is_compiling()
            return by_row(x) and takes_scaled_input(self, x)

        def input_scale_of(self, x):
            """The calibrated scale ``[]`` where ``x`` is, None without one."""
            from comfy.model_management import cast_to_device

            scale = getattr(self, "input_scale", None)
            return None if scale is None else cast_to_device(scale, x.device, torch.float32).reshape(())

        def adds_rows(self, x, gate) -> bool:
            """Whether this layer's product, times ``gate``, adds itself to tokens like ``x``, where it gets ``ops.OntoRows``."""
            like = ops.Rows(x, x)  # all that is asked of a matrix before there is one is how many channels it has
            return self.takes_rows(x) and ops.add_product_fp8.choose(x, like, like, None, gate)[0] != "reference"

        def forward(self, input, *args, **kwargs):
            if isinstance(input, ops.OntoRows):
                y = ops.row_fp8(input.y) if isinstance(input.y, torch.Tensor) else input.y
                rows = quantised(*y, self.layout_type, input.x.dtype)
                rows.onto = input
                return super().forward(rows, *args, **kwargs)
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
            if (onto := getattr(input, "onto", None)) is not None:
                return ops.add_product_fp8(
                    onto.x, ops.Rows(input._qdata, scale), ops.Rows(weight._qdata, weight._params.scale), bias, onto.gate,
                    onto.extra, frames=onto.frames, given=onto.given)
            if scale is None or scale.ndim != 2 and not in_rows(self, input, weight):
                return super()._forward(input, weight, bias)
            rows = scale if scale.ndim == 2 else ones(input.device, len(input))
            columns = columns_of(self, weight, None if scale.ndim == 2 else scale)
            return row_product(input._qdata, rows, weight._qdata, columns, bias, input._params.orig_dtype)

    return type(operations.__name__, (operations,), {"Linear": Linear})


@functools.lru_cache(maxsize=8)
def ones(device: torch.device, rows: int):
    """``[rows, 1]`` float32: the scale a row of an input with one for all, which then goes to the weight's."""
    return torch.ones(rows, 1, device=device)


COLUMNS = weakref.WeakKeyDictionary()  # {layer: (its weight and input scale, both weakly; device and which scales; columns)}


def columns_of(layer, weight, scale):
    """``[1, M]``: the scale of ``weight``, times ``scale`` where there is one. Kept as long as the layer has the same weight and
    input scale: made anew for every product, they were a quarter of a step's launches."""
    if torch.compiler.is_compiling():
        return columns(weight._params.scale, scale, len(weight))
    own, given, place = layer.weight, getattr(layer, "input_scale", None), (weight.device, scale is None)
    kept = COLUMNS.get(layer)
    if kept is None or kept[0]() is not own or kept[1]() is not given or kept[2] != place:
        made = columns(weight._params.scale, scale, len(weight))
        kept = COLUMNS[layer] = weakref.ref(own), (lambda: None) if given is None else weakref.ref(given), place, made
    return kept[3]


def columns(own, scale, count: int):
    own = (own if scale is None else own * scale).float()
    return own.reshape(1, 1).expand(1, count).contiguous()


def in_rows(layer, x, weight) -> bool:
    """Whether an input with one scale is multiplied as rows that have one each: when both were tried on an H200, a CFG step took
    277 to 281 ms with torch's other product and 258 to 260 with this one."""
    return (
        not torch.compiler.is_compiling() and layer.quant_format == FORMAT and hasattr(weight, "_qdata")
        and x._params.orig_dtype == torch.bfloat16 and multiplies_rows(x.device))


def by_row(x) -> bool:
    """Whether inputs like ``x`` get a scale a row: :func:`row_product` takes them, and gives bfloat16."""
    return x.dtype == torch.bfloat16 and multiplies_rows(x.device)


def takes_scaled_input(layer, x) -> bool:
    """Whether core would multiply ``x`` in E4M3 as it is, with no scale."""
    return getattr(layer, "input_scale", None) is None and multiplies(layer, x)


def multiplies(layer, x) -> bool:
    """Whether core would multiply ``x`` in E4M3: the layer's format and options, no LoRA, no training."""
    from comfy.quant_ops import QuantizedTensor

    return (
        getattr(layer, "quant_format", None) == FORMAT and not layer._full_precision_mm
        and getattr(layer, "pre_quant_scale", None) is None and not isinstance(x, QuantizedTensor) and not x.requires_grad
        and not getattr(layer, "comfy_force_cast_weights", False) and not layer.weight_function and not layer.bias_function)


def quantised(values, scale, layout: str, dtype):
    """E4M3 values ``[..., C]`` with a scale for all or ``[..., 1]`` as core's matrix ``[N, C]``, of a tensor of ``dtype``."""
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    values, scale = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1) if scale.ndim else scale
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(values.shape))
    return QuantizedTensor(values, layout, params)


def row_product(x, x_scale, weight, weight_scale, bias, dtype):
    """``(x * x_scale) (weight * weight_scale)^T + bias``: E4M3 ``x [N, C]``, ``weight [M, C]``, scales ``[N, 1]``, ``[1, M]``."""
    return torch._scaled_mm(x.contiguous(), weight.t(), x_scale, weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def fp8_layers_of(network) -> dict:
    """{name: layer} of the network's layers in fp8."""
    return {name: m for name, m in network.named_modules() if getattr(m, "quant_format", None) == FORMAT}


def calibrate(network, run) -> tuple[dict[str, float], dict[str, Seen]]:
    """Give the network's fp8 layers the input scales that ``run()`` asks for; returns these, and what it showed of the inputs of
    all. A layer whose inputs spread too far, or are no numbers, stays as it is.
    """
    with watched(fp8_layers_of(network)) as seen:
        run()
    scales = {name: inputs.scale() for name, inputs in seen.items() if inputs.spread() <= SPREAD}
    set_input_scales(network, scales)
    return scales, seen


def set_input_scales(network, scales: dict[str, float]) -> None:
    """Input scales of some fp8 layers. One that kept 16 bits for want of it multiplies in E4M3 now, where the card does."""
    layers = fp8_layers_of(network)
    for name, scale in scales.items():
        layer = layers[name]
        layer.input_scale = torch.nn.Parameter(torch.tensor(scale, device=layer.weight.device), requires_grad=False)
        if layer._full_precision_mm_config:
            layer._full_precision_mm_config = False
            layer._full_precision_mm = layer.quant_format in layer._disabled_formats


@torch.compiler.assume_constant_result
@functools.cache
def multiplies_rows(device: torch.device) -> bool:
    """Whether torch multiplies E4M3 with a scale a row there (it depends on card, torch and system): a small product tells."""
    if device.type != "cuda":
        return False
    x, scale = torch.ones(16, 32, device=device).to(torch.float8_e4m3fn), torch.full((16, 1), 2.0, device=device)
    try:
        found = row_product(x, scale, x, torch.ones(1, 16, device=device), None, torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.info("fp8 with one scale for all rows: this device has no product with a scale a row (%s)", str(error)[:120])
        return False
    return bool((found == 64).all())
