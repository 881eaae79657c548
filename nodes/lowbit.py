"""Low-bit weights in ComfyUI's own quantised layers: what this ComfyUI can do, and conversion while a model loads.

A quantised layer is handed over as the tensors that a quantised file would hold, so a model quantised here and a quantised
file take the same way through core's loader, patcher, LoRAs and 'ModelSave'. The numbers are packed by ComfyUI's library,
always on the CPU, so that weights and fingerprint do not depend on the card. Which layers: ``sana_video_core/quant``. Needs
ComfyUI inside the functions only.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping

from ..sana_video_core.errors import CheckpointError, SanaVideoError
from ..sana_video_core.quant.policy import POLICIES, Mark, formats_of, plan
from ..sana_video_core.specs import ModelSpec

log = logging.getLogger(__name__)

LOW_BIT = list(POLICIES)
PROBE_ERROR = 0.25  # nvfp4 on normal numbers has 0.1; a wrong layout more than 1
HARDWARE = {  # format -> (core's test in comfy.model_management, what it asks for)
    "float8_e4m3fn": ("supports_fp8_compute", "an RTX 40, H100 or newer"),
    "float8_e5m2": ("supports_fp8_compute", "an RTX 40, H100 or newer"),
    "mxfp8": ("supports_mxfp8_compute", "an RTX 50 or B200 and torch 2.10"),
    "nvfp4": ("supports_nvfp4_compute", "an RTX 50 or B200"),
}


def lacking(name: str) -> str | None:
    """Why this ComfyUI's layers cannot hold weights of the format, or None. Tried out on a small matrix on the CPU."""
    import comfy.quant_ops as quant
    import torch

    if not getattr(quant, "_CK_AVAILABLE", True):
        return "the package comfy-kitchen is not installed"
    if name not in quant.QUANT_ALGOS:
        return f"this ComfyUI (or its comfy-kitchen) does not know the format {name}"
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator) for n in (32, 4))
    try:
        packed = pack(weight, Mark(name, {}))
        error = (torch.nn.functional.linear(x, packed) - x @ weight.T).norm() / (x @ weight.T).norm()
    except Exception as problem:  # a missing dtype, operator or backend: each has an error class of its own
        return f"the format {name} does not work here ({type(problem).__name__}: {str(problem).strip()[:120]})"
    return None if error < PROBE_ERROR else f"the format {name} gives wrong numbers here (relative error {float(error):.2f})"


def require_formats(names: Collection[str], what: str) -> None:
    """Refuse ``what`` (the beginning of a sentence) when a format is not supported, with the nearest choice that is."""
    reasons = [reason for name in sorted(names) if (reason := lacking(name))]
    if reasons:
        others = [p for p in LOW_BIT if not any(lacking(name) for name in formats_of(p))] + ["bf16"]
        raise SanaVideoError(f"{what} cannot be used here", found="; ".join(reasons),
                             expected="ComfyUI 0.30 with the comfy-kitchen it asks for",
                             action=f"Choose the unquantised model in precision {' or '.join(others)}, or update ComfyUI")


def pack(weight, mark: Mark):
    """``weight`` ``[out, in]`` (float32, CPU) as ComfyUI's quantised tensor."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    from ..sana_video_core.quant.formats import rotation, tensor_scale

    options: dict = {}
    if mark.format in ("float8_e4m3fn", "nvfp4"):
        options["scale"] = tensor_scale(weight, mark.format)
    elif mark.format == "int8_tensorwise":  # a scale a row; ComfyUI reckons those of the inputs a token
        group = rotation(mark)
        options = {"per_channel": True, **({"convrot": True, "convrot_groupsize": group} if group else {})}
    return QuantizedTensor.from_float(weight, QUANT_ALGOS[mark.format]["comfy_tensor_layout"], **options)


def quantise(native: dict, spec: ModelSpec, precision: str, name: str = "") -> dict[str, Mark]:
    """Replace the weights of ``native`` that the policy names by the tensors of a quantised file; returns what was done.

    One layer at a time, so the peak is the finished model and one matrix in float32. Biases and all else stay as they are.
    Shows its progress on the running node and ends on Cancel: nvfp4 takes minutes for 2B weights on few cores.
    """
    import comfy.model_management as management
    import comfy.utils
    import torch

    from ..sana_video_core.quant.formats import mark_tensor

    require_formats(formats_of(precision), f"Precision '{precision}'")
    marks = plan(spec, precision)
    bar = comfy.utils.ProgressBar(len(marks))
    for layer, mark in marks.items():
        management.throw_exception_if_processing_interrupted()
        weight = native.pop(f"{layer}.weight").to("cpu", torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"The weights of {name or 'the model'} cannot be quantised",
                                  found=f"{layer}.weight: a value that is not finite", action="Download the file again")
        native.update(pack(weight, mark).state_dict(f"{layer}.weight"))
        native[f"{layer}.comfy_quant"] = mark_tensor(mark)
        bar.update(1)
    return marks


def require_same(marks: Mapping[str, Mark], precision: str, name: str) -> None:
    """Refuse to quantise once more: bits that a file has lost do not come back."""
    found = {mark.format for mark in marks.values()}
    if not found <= formats_of(precision):
        raise SanaVideoError(f"The file {name} is quantised already", found=", ".join(sorted(found)),
                             expected=f"an unquantised file for precision '{precision}'", action="Choose precision 'auto'")


def multiplies_in(name: str, device) -> bool:
    """Whether ComfyUI multiplies in the format on ``device``; elsewhere it expands the weights."""
    import comfy.model_management as management

    if name not in HARDWARE:
        return True
    return not management.is_device_cpu(device) and getattr(management, HARDWARE[name][0])(device)


def describe(marks: Mapping[str, Mark], device) -> str:
    """What will run how on ``device``: '70 layers in float8_e4m3fn (20 multiply in it, 50 in 16 bits)' and why not all."""
    parts = []
    for name, number in Counter(mark.format for mark in marks.values()).items():
        wide = sum(1 for m in marks.values() if m.format == name and m.options.get("full_precision_matrix_mult"))
        if not multiplies_in(name, device):
            parts.append(f"{number} layers in {name}: smaller, not faster; multiplying in it needs {HARDWARE[name][1]}")
        elif wide:
            parts.append(f"{number} layers in {name}: {number - wide} multiply in it, {wide} only save memory")
        else:
            parts.append(f"{number} layers in {name}")
    return "; ".join(parts)
