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

log = logging.getLogger(__name__)

PRECISIONS = ["auto", "bf16", "fp32"]
MODES = ["auto", "clip", "long"]
QUANT_SUFFIXES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")


def load_diffusion(path: str, precision: str = "auto", mode: str = "auto", disable_dynamic: bool = False):
    """A ModelPatcher around the checkpoint at ``path``. Nothing is allocated before the file has been checked."""
    from ..sana_video_core.checkpoint import convert, detect_spec, read_state_dict

    state, source = read_state_dict(path)
    state, quantised, metadata = split_quantised(state, source.metadata)
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    spec = detect_spec(shapes, metadata=metadata, container=source.container, path=path,
                       hint=None if mode == "auto" else mode)
    native = convert(state, spec, to="native", quantised=quantised, name=source.name)
    native.update(quantised)
    patcher = build_patcher(native, spec, precision, bool(quantised), disable_dynamic)
    patcher.cached_patcher_init = (load_diffusion, (path, precision, mode))
    log.info("%s: %s, %s mode (%s), shift %g", Path(path).name, spec.name, "long" if spec.causal else "clip",
             "detected" if mode == "auto" else "chosen", spec.flow_shift)
    return patcher


def split_quantised(state: dict, metadata: dict) -> tuple[dict, dict, dict]:
    """(plain tensors, tensors of quantised layers, metadata). ComfyUI's own marks are understood (comfyui spec 5.2)."""
    import comfy.utils

    try:
        state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError("The file's list of quantised layers cannot be read", found=str(error)[:120],
                              action="Download the file again") from error
    layers = {name.removesuffix(".comfy_quant") for name in state if name.endswith(".comfy_quant")}
    quantised = {name: t for name, t in state.items() if name.endswith(QUANT_SUFFIXES)}
    if not layers:
        return state, {}, metadata
    return {name: t for name, t in state.items() if name not in quantised}, quantised, metadata


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
