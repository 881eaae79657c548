"""From files to MODEL, CLIP and VAE objects. Everything that needs ComfyUI's runtime is imported inside the functions.

The core reads and checks the files; ComfyUI's patchers own the devices. ``cached_patcher_init`` is set everywhere, so
that ComfyUI can load a part again (TorchCompileModel, several GPUs) under DynamicVRAM (comfyui spec 4).
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..sana_video_core.errors import CheckpointError, SanaVideoError
from ..sana_video_core.specs import WAN21, ModelSpec
from .common import describe_vae, require_vae, vae_geometry
from .lowbit import LOW_BIT, describe, quantise, require_formats, require_same

log = logging.getLogger(__name__)

PRECISIONS = ["auto", "bf16", "fp32", *LOW_BIT]  # appended only: saved workflows name them
MODES = ["auto", "clip", "long"]


def load_diffusion(path: str, precision: str = "auto", mode: str = "auto", disable_dynamic: bool = False):
    """A ModelPatcher around the checkpoint at ``path``. Nothing is allocated before the file has been checked."""
    from ..sana_video_core.checkpoint import convert, detect_spec, read_state_dict
    from ..sana_video_core.checkpoint.keys import QUANT_SUFFIXES

    state, source = read_state_dict(path)
    state, marks = read_quantised(state, source.metadata, source.name)
    shapes = {name: tuple(t.shape) for name, t in state.items() if not name.endswith(QUANT_SUFFIXES)}
    spec = detect_spec(shapes, metadata=source.metadata, container=source.container, path=path,
                       hint=None if mode == "auto" else mode)
    native = convert(state, spec, to="native", quantised=marks, name=source.name)
    given, marks = bool(marks), low_bit(native, state, marks, spec, precision, source.name)
    del state
    patcher = build_patcher(native, spec, precision, bool(marks), disable_dynamic)
    patcher.model.quantised_here = bool(marks) and not given
    patcher.cached_patcher_init = (load_diffusion, (path, precision, mode))
    log.info("%s: %s, %s mode (%s), shift %g%s", Path(path).name, spec.name, "long" if spec.causal else "clip",
             "detected" if mode == "auto" else "chosen", spec.flow_shift,
             f"; {describe(marks, patcher.load_device)}" if marks else "")
    return patcher


def read_quantised(state: dict, metadata: dict, name: str) -> tuple[dict, dict]:
    """(weights, {layer: Mark}). Files with ComfyUI's older marks (``scaled_fp8``) come out in today's form."""
    from ..sana_video_core.quant.files import read_marks

    if "scaled_fp8" in state:
        import comfy.utils

        try:
            state, _ = comfy.utils.convert_old_quants(dict(state), "", metadata={})
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError("The file's list of quantised layers cannot be read", found=str(error)[:120],
                                  action="Download the file again") from error
    return state, read_marks(state, metadata, name)


def low_bit(native: dict, state: dict, marks: dict, spec: ModelSpec, precision: str, name: str) -> dict:
    """{layer: Mark} of the model as it will run: the file's own, checked, or those of ``precision``, made here in ``native``."""
    from ..sana_video_core.quant.files import check_layers
    from ..sana_video_core.quant.formats import mark_tensor

    if not marks:
        return quantise(native, spec, precision, name) if precision in LOW_BIT else marks
    check_layers(state, marks, spec, name)
    if precision in LOW_BIT:
        require_same(marks, precision, name)
    require_formats({mark.format for mark in marks.values()}, f"The file {name}")
    native.update({f"{layer}.comfy_quant": mark_tensor(mark) for layer, mark in marks.items()})
    return marks


def build_patcher(native: dict, spec: ModelSpec, precision: str, quantised: bool, disable_dynamic: bool):
    """Build the model for native weights and hand them over."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.utils
    import torch

    from .native import SanaVideoConfig

    config = SanaVideoConfig(spec)
    config.quant_config = comfy.utils.detect_layer_quantization(native, "") if quantised else None
    supported = config.supported_inference_dtypes
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision)
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(native), supported_dtypes=supported,
            weight_dtype=None if quantised else comfy.utils.weight_dtype(native))
    device = management.get_torch_device()
    config.set_inference_dtype(dtype, management.unet_manual_cast(None if quantised else dtype, device, supported),
                               device=device)
    model = config.get_model(native, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=management.unet_offload_device())
    if not management.is_device_cpu(patcher.offload_device):
        model.to(patcher.offload_device)
    model.load_model_weights(native, "", assign=patcher.is_dynamic())
    return patcher


def read_part(path: str, part: str) -> tuple[dict, dict]:
    """(state dict, metadata) of a text encoder or VAE file, read without running anything stored in it."""
    import comfy.utils

    try:
        state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # unpickling errors and safetensors' own error class share no base below Exception
        reraise_if_out_of_memory(error)
        raise CheckpointError(f"The {part} file cannot be read",
                              found=f"{Path(path).name}: {type(error).__name__} {str(error)[:200]}",
                              action="Download it again; the copy is damaged or of another format") from error
    if not isinstance(state, dict) or not all(hasattr(t, "shape") for t in state.values()):
        raise CheckpointError(f"The {part} file holds no table of weights", found=Path(path).name)
    return state, metadata or {}


def reraise_if_out_of_memory(error: Exception) -> None:
    """Out of memory is no fault of a file: let ComfyUI see it as it is."""
    import comfy.model_management

    if comfy.model_management.is_oom(error):
        raise error


def load_vae(path: str, spec: ModelSpec):
    """ComfyUI's VAE object for the file, refused unless its latents are those of ``spec``."""
    import comfy.sd

    state, metadata = read_part(path, "VAE")
    name = Path(path).name
    try:
        vae = comfy.sd.VAE(sd=state, metadata=metadata)
    except (KeyError, IndexError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        reraise_if_out_of_memory(error)
        raise CheckpointError("The VAE file is not one that ComfyUI knows", found=f"{name}: {str(error)[:200]}",
                              expected=f"{spec.vae.name} in ComfyUI's naming",
                              action=f"Choose {spec.vae.file_hint}") from error
    if vae.first_stage_model is None:
        raise CheckpointError("The VAE file holds no VAE", found=name, action=f"Choose {spec.vae.file_hint}")
    geometry = vae_geometry(vae)
    require_vae(vae, spec.vae, f"The VAE {name}")
    missing = sorted(set(vae.first_stage_model.state_dict()) - set(state)) if spec.vae == WAN21 else []
    if missing:
        raise CheckpointError("The VAE file is not complete", action=f"Choose {spec.vae.file_hint}",
                              found=f"{name}: {len(missing)} tensors missing, such as {', '.join(missing[:3])}")
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (path, metadata or None))
    log.info("%s: %s", name, describe_vae(geometry))
    return vae


def refuse_fp16(precision: str) -> None:
    """Half precision is named apart, because people ask for it."""
    if precision in ("fp16", "float16", "half"):
        raise SanaVideoError("SANA-Video cannot run in fp16", found=precision, expected=", ".join(PRECISIONS),
                             action="Use bf16 (same memory): the sums of linear attention leave fp16's range")
