"""Wan 2.1 VAE files into :class:`WanVAE`: official and ComfyUI names, diffusers names, any base width (vae/text spec 1.2).

The name map is a rule over the official names; a test compares it with the complete list of 194 names.
Not covered: other VAEs, which are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.convert import WEIGHT_DTYPES, shapes_of, short
from ..checkpoint.families import foreign_family
from ..checkpoint.source import Source, read_state_dict
from ..errors import CheckpointError
from .wan import WAN21_MEAN, WanVAE

Z_DIM = len(WAN21_MEAN)
SHOWN = 4
_PREFIXES = ("first_stage_model.", "vae.", "")
_ACTION = "Choose wan_2.1_vae.safetensors or Wan2.1_VAE.pth"
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
             "shortcut": "conv_shortcut"}
_UP_STEP = 4  # a stage of the decoder: three residual blocks and an up-step

# (what it is, patterns that must each match a name)
_OTHER_VAES = (
    ("the Wan 2.2 VAE", (r"^(decoder\.upsamples\.0\.upsamples|encoder\.downsamples\.0\.downsamples)\.",)),
    ("the Wan 2.2 VAE (diffusers)", (r"^decoder\.up_blocks\.0\.upsampler\.", r"^post_quant_conv\.")),
    ("an LTX video VAE", (r"^(vae\.)?(decoder|encoder)\.(up|down)_blocks\.\d+\.(res_blocks|resnets\.\d+\.conv1\.conv)\.?",)),
    ("a DC-AE", (r"^(decoder|encoder)\.(stages|project_in|project_out|input_stages)\b",)),
    ("an image VAE", (r"^decoder\.(mid|up)\.", r"^decoder\.conv_out\.")),
    ("a tiny preview VAE", (r"^(decoder|encoder)\.\d+\.(weight|bias|conv\.)",)),
)


def to_diffusers(name: str) -> str:
    """The diffusers name of an official name, such as 'decoder.head.2.weight' -> 'decoder.conv_out.weight'."""
    side, _, rest = name.partition(".")
    if side in ("conv1", "conv2"):
        return f"{'quant_conv' if side == 'conv1' else 'post_quant_conv'}.{rest}"
    layer, _, inner = rest.partition(".")
    if layer == "conv1":
        return f"{side}.conv_in.{inner}"
    number, _, inner = inner.partition(".")
    n = int(number)
    if layer == "head":
        return f"{side}.{'norm_out' if n == 0 else 'conv_out'}.{inner}"
    if layer == "middle":
        return f"{side}.mid_block." + (f"attentions.0.{inner}" if n == 1 else f"resnets.{n // 2}.{_residual(inner)}")
    if layer == "downsamples":
        return f"{side}.down_blocks.{n}.{_residual(inner)}"
    stage, place = divmod(n, _UP_STEP)
    if place == _UP_STEP - 1:
        return f"{side}.up_blocks.{stage}.upsamplers.0.{inner}"
    return f"{side}.up_blocks.{stage}.resnets.{place}.{_residual(inner)}"


def _residual(inner: str) -> str:
    module, _, kind = inner.rpartition(".")
    return f"{_RESIDUAL.get(module, module)}.{kind}"


def vae_names(dim: int = 96) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{official name: (diffusers name, shape)} of all parameters of a Wan 2.1 VAE with this base width."""
    skeleton = WanVAE(dim, Z_DIM, device="meta")
    return {name: (to_diffusers(name), tuple(p.shape)) for name, p in skeleton.state_dict().items()}


def convert_vae(state: Mapping[str, Tensor], to: str = "official") -> dict[str, Tensor]:
    """A complete state dict under 'official' (also ComfyUI's) or 'diffusers' names, from either; the tensors are the same."""
    naming = _naming(state)
    table = vae_names(_base_width(state, naming, "state dict"))
    pick = {"official": lambda name, theirs: name, "diffusers": lambda name, theirs: theirs}
    _require_complete(shapes_of(state), {pick[naming](k, v[0]): v[1] for k, v in table.items()}, "state dict")
    return {pick[to](name, theirs): state[pick[naming](name, theirs)] for name, (theirs, _) in table.items()}


def load_wan_vae(source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> WanVAE:
    """The VAE with the weights of ``source`` (a path, a diffusers repository or vae folder, or a state dict), evaluation mode.

    CheckpointError for damaged or incomplete files and for other VAEs, before anything is allocated.
    """
    state, origin = read_state_dict(source, part="vae")
    state = _without_prefix(state)
    _refuse_others(state, origin)
    naming = _naming(state)
    dim = _base_width(state, naming, origin.name)
    odd = next((f"{key} {short(t.dtype)}" for key, t in state.items() if t.dtype not in WEIGHT_DTYPES), None)
    if odd:
        raise CheckpointError(f"The VAE file {origin.name} is damaged", found=odd, expected="floating point weights",
                              action=_ACTION)
    table = vae_names(dim)
    expected = {(theirs if naming == "diffusers" else name): shape for name, (theirs, shape) in table.items()}
    _require_complete(shapes_of(state), expected, origin.name)
    weights = {}
    for name, (theirs, _) in table.items():
        tensor = state[theirs if naming == "diffusers" else name]
        weights[name] = tensor.to(device=device, dtype=dtype, copy=origin.path is None)
    vae = WanVAE(dim, Z_DIM, dtype=dtype, device="meta")
    vae.load_state_dict(weights, strict=True, assign=True)
    return vae.eval()


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in _PREFIXES if any(key.startswith(f"{p}decoder.") for key in state)), "")
    return {key[len(prefix):]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _naming(names: Mapping[str, object]) -> str:
    theirs = ("quant_conv.", "post_quant_conv.", "encoder.conv_in.", "encoder.mid_block.", "encoder.down_blocks.",
              "decoder.conv_in.", "decoder.mid_block.", "decoder.up_blocks.")
    return "diffusers" if sum(name.startswith(theirs) for name in names) > len(names) // 4 else "official"


def _base_width(state: Mapping[str, Tensor], naming: str, name: str) -> int:
    """Read from the last norm of the decoder, or from its last convolution should that be damaged."""
    norm, conv = ("decoder.norm_out.gamma", "decoder.conv_out.weight") if naming == "diffusers" else (
        "decoder.head.0.gamma", "decoder.head.2.weight")
    for key, axis, ndim in ((norm, 0, 4), (conv, 1, 5)):
        if key in state and state[key].ndim == ndim:
            return state[key].shape[axis]
    raise CheckpointError(f"The file {name} is not a complete Wan 2.1 VAE", found=f"no usable tensor {norm}", action=_ACTION)


def _refuse_others(state: Mapping[str, Tensor], origin: Source) -> None:
    def refuse(what: str):
        return CheckpointError(f"The file {origin.name} is not a Wan 2.1 VAE", found=what, expected="the Wan 2.1 VAE",
                               action=_ACTION)

    for what, patterns in _OTHER_VAES:
        if all(any(re.search(p, name) for name in state) for p in patterns):
            raise refuse(what)
    family = foreign_family(shapes_of(state))
    if family and not family[0].endswith("VAE"):
        raise refuse(family[0])
    if any(re.match(r"(transformer_)?blocks\.\d+\.", name) for name in state):
        raise refuse("a diffusion model")
    latent = next((state[key] for key in ("conv2.weight", "post_quant_conv.weight") if key in state), None)
    if latent is not None and (latent.ndim != 5 or latent.shape[0] != Z_DIM):
        raise refuse("an image VAE" if latent.ndim == 4 else f"a video VAE with weights {list(latent.shape)} before its decoder")


def _require_complete(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    """One error that lists missing, unexpected and mis-shaped tensors."""
    faults = [([key for key in expected if key not in found], "missing"),
              ([key for key in found if key not in expected], "unexpected"),
              ([f"{key} {list(found[key])} instead of {list(shape)}" for key, shape in expected.items()
                if key in found and found[key] != shape], "of another shape")]
    if any(keys for keys, _ in faults):
        text = "; ".join(f"{len(keys)} {kind} ({', '.join(k[:100] for k in keys[:SHOWN])})" for keys, kind in faults if keys)
        raise CheckpointError(f"The VAE file {name} is not a complete Wan 2.1 VAE", found=text,
                              expected=f"{len(expected)} tensors", action=_ACTION)
