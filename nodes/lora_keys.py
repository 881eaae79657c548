"""LoRA key names of every public habit, mapped onto the network's own weights.

diffusers splits what the network merges (q, k, v; k, v of cross attention), so a name maps to a weight or to a slice of
its rows. Source: model spec 2.2. Plain torch; ComfyUI's adapters do the arithmetic afterwards.
"""

from __future__ import annotations

import json
import math

from ..sana_video_core.checkpoint.keys import BLOCK, SLICES, TOP
from ..sana_video_core.specs import ModelSpec

Target = str | tuple[str, tuple[int, int, int]]  # weight key, or (weight key, (axis, first row, rows))

_DOTTED = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "base_model.model.",
           "base_model.model.transformer.", "base_model.model.diffusion_model.")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_INNER = "diffusion_model."


def key_map(weights: dict[str, tuple[int, ...]], spec: ModelSpec) -> dict[str, Target]:
    """{LoRA module name: target} for all naming habits; ``weights`` are the model's keys ('diffusion_model. ...')."""
    modules: dict[str, Target] = {}
    for key in weights:
        if key.startswith(_INNER) and not key.endswith(".bias"):
            modules[key[len(_INNER):].removesuffix(".weight")] = key
    named = {**modules, **_diffusers_names(modules, spec)}
    table: dict[str, Target] = {}
    for name, target in named.items():
        table.update({prefix + name: target for prefix in _DOTTED})
        table.update({prefix + name.replace(".", "_"): target for prefix in _FLAT})
    return table


def _diffusers_names(modules: dict[str, Target], spec: ModelSpec) -> dict[str, Target]:
    names: dict[str, Target] = {theirs: modules[ours] for ours, theirs in TOP.items() if ours in modules}
    for i in range(spec.depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        names.update({theirs + b: modules[ours + a] for a, b in BLOCK.items() if ours + a in modules})
        for a, parts in SLICES.items():
            for n, part in enumerate(parts):
                names[theirs + part] = (modules[ours + a], (0, n * spec.width, spec.width))
    return names


def as_linear(state: dict, table: dict[str, Target], shapes: dict[str, tuple[int, ...]]) -> dict:
    """The LoRA with convolution weights in the layout of the network's Linear layers. The given dict is left alone."""
    out = {}
    for key, tensor in state.items():
        name, kind = _split(key, table)
        target = table.get(name)
        weight = target if isinstance(target, str) else None
        if weight and weight.endswith("t_conv.weight") and tensor.ndim == 4 and tensor.shape[2] == 3:
            tensor = tensor[..., 0].permute(0, 2, 1).flatten(1)  # taps side by side: previous, same, next frame
        if weight and kind in ("diff", "set_weight") and math.prod(tensor.shape) == math.prod(shapes[weight]):
            tensor = tensor.reshape(shapes[weight])
        out[key] = tensor
    return out


def misfits(state: dict, table: dict[str, Target], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Readable lines for plain LoRA pairs whose sizes are not those of the weight they name."""
    lines = []
    for key, tensor in state.items():
        name, kind = _split(key, table)
        if name not in table or not kind.endswith(("lora_up", "lora_B", "lora_down", "lora_A")):
            continue
        weight, rows = (table[name], None) if isinstance(table[name], str) else (table[name][0], table[name][1][2])
        rows, columns = rows or shapes[weight][0], math.prod(shapes[weight][1:])
        up = kind.endswith(("lora_up", "lora_B"))
        found, wanted = (tensor.shape[0], rows) if up else (math.prod(tensor.shape[1:]), columns)
        if found != wanted:
            lines.append(f"{key}: {found} instead of {wanted}")
    return lines


def _split(key: str, table: dict[str, Target]) -> tuple[str, str]:
    """(module name in ``table`` or "", the kind of tensor such as 'lora_A' or 'diff')."""
    stem = key.removesuffix(".weight").removesuffix(".default")
    cut = len(stem)
    while (cut := stem.rfind(".", 0, cut)) > 0:
        if stem[:cut] in table:
            return stem[:cut], stem[cut + 1:]
    return "", ""


def metadata_scale(metadata: dict) -> float:
    """alpha / rank when a diffusers file keeps them in its metadata only (then its tensors carry no alpha)."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        values = {k.rsplit(".", 1)[-1]: v for k, v in config.items()}
        scale = float(values["lora_alpha"]) / float(values["r"])
        return scale if math.isfinite(scale) and scale > 0 else 1.0
    except (ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError):
        return 1.0


class Reading(dict):
    """A state dict that remembers which keys were taken, so that the rest can be reported by name."""

    def __init__(self, state: dict):
        super().__init__(state)
        self.taken: set[str] = set()

    def __getitem__(self, key):
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        """As ``dict.get``; a key that is there counts as taken."""
        if key not in self:
            return default
        return self[key]

    def left(self) -> list[str]:
        """Keys nobody asked for."""
        return sorted(set(self) - self.taken)
