"""ComfyUI's fp8 layers with inputs that are scaled by their own largest value.

Where a file has no calibrated ``input_scale``, core's layer casts its input to E4M3 as it is and cuts what lies beyond 448
(comfyui spec 5.2). Hidden layers and attention have no such bound, so here every such input gets a scale of its own, made in two
passes over it (``ops.scaled_fp8``), and core's layer gets the finished tensor. Needs ComfyUI inside the functions only.
"""

from __future__ import annotations

from ..sana_video_core import ops

FORMAT = "float8_e4m3fn"


def with_scaled_inputs(operations):
    """The layer classes of core's mixed precision with such an fp8 Linear; other ones as they are."""
    if not hasattr(operations, "_quant_config"):
        return operations

    class Linear(operations.Linear):
        def forward(self, input, *args, **kwargs):
            if not takes_scaled_input(self, input):
                return super().forward(input, *args, **kwargs)
            return super().forward(scaled(input, self.layout_type), *args, **kwargs).reshape(*input.shape[:-1], -1)

    return type(operations.__name__, (operations,), {"Linear": Linear})


def takes_scaled_input(layer, x) -> bool:
    """Whether core would multiply ``x`` in E4M3 as it is: the layer's format and options, no LoRA, no scale, no training."""
    from comfy.quant_ops import QuantizedTensor

    return (
        getattr(layer, "quant_format", None) == FORMAT and not layer._full_precision_mm
        and getattr(layer, "input_scale", None) is None and getattr(layer, "pre_quant_scale", None) is None
        and not isinstance(x, QuantizedTensor) and not x.requires_grad
        and not getattr(layer, "comfy_force_cast_weights", False) and not layer.weight_function and not layer.bias_function)


def scaled(x, layout: str):
    """``x [..., C]`` as core's quantised rows ``[N, C]``."""
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    rows = x.reshape(-1, x.shape[-1])
    values, scale = ops.scaled_fp8(rows)
    params = get_layout_class(layout).Params(scale=scale, orig_dtype=x.dtype, orig_shape=tuple(rows.shape))
    return QuantizedTensor(values, layout, params)
