"""What several nodes share: checked numbers, the spec of a MODEL, the fit of a VAE, the embedded model's files.

ComfyUI checks a widget's range, but not a linked value, and NaN passes every comparison; so each node checks its own
numbers here. Nothing here needs ComfyUI to import.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..sana_video_core.errors import SanaVideoError
from ..sana_video_core.specs import ModelSpec, VaeSpec

CATEGORY = "SANA-Video"
EMBEDDED, EMBEDDED_LONG = "embedded mini", "embedded mini long"  # entries of the model list that need no download
NONE = "none"


class MissingPartError(SanaVideoError, AttributeError):
    """A CLIP or VAE was used that the loader was not asked to load. Also an AttributeError, so that ``hasattr`` works."""


class MissingPart:
    """Stands in for a CLIP or VAE that was not chosen, and says so when something uses it.

    A plain None would surface in whatever stock node comes next as an error about NoneType.
    """

    def __init__(self, part: str, action: str):
        self._part, self._action = part, action

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingPartError(f"There is no {self._part} on this wire", found="the loader's choice 'none'",
                               action=self._action)


def require_part(value: object, part: str, action: str) -> None:
    """Refuse None and MissingPart for a required CLIP or VAE."""
    if value is None or isinstance(value, MissingPart):
        raise SanaVideoError(f"There is no {part} on this wire", found="nothing", expected=f"a {part}", action=action)


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """``value`` as an int within low..high, else an error that names the nearest valid value."""
    number = finite(name, value, -math.inf, math.inf)
    nearest = min(max(round(number), low), high)
    if number != nearest:
        raise SanaVideoError(f"'{name}' must be a whole number from {low} to {high}", found=value,
                             action=f"Use {nearest}")
    return int(nearest)


def finite(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a finite float within low..high, else an error that names the nearest valid value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SanaVideoError(f"'{name}' must be a number", found=repr(value)[:80])
    number = float(value) if abs(value) < 1e300 else math.inf
    if not math.isfinite(number):
        raise SanaVideoError(f"'{name}' must be a finite number", found=value,
                             action=f"Use a number from {low:g} to {high:g}" if math.isfinite(low) else None)
    if not low <= number <= high:
        raise SanaVideoError(f"'{name}' must lie from {low:g} to {high:g}", found=value,
                             action=f"Use {min(max(number, low), high):g}")
    return number


def choice(name: str, value: object, options: list[str]) -> str:
    """``value`` if it is one of ``options``, else an error that lists them."""
    if value not in options:
        raise SanaVideoError(f"'{name}' has no choice of that name", found=repr(value)[:80], expected=", ".join(options))
    return str(value)


def spec_of(model: object) -> ModelSpec:
    """The ModelSpec of a MODEL made by the loader; any other MODEL is refused by its class name."""
    inner = getattr(model, "model", None)
    spec = getattr(inner, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise SanaVideoError("This MODEL is not a SANA-Video model", found=type(inner if inner is not None else model).__name__,
                             expected="a MODEL from the node 'Load SANA-Video'",
                             action="Connect the MODEL output of 'Load SANA-Video'")
    return spec


def vae_geometry(vae: object) -> tuple[int, tuple[int, int, int]] | None:
    """(latent channels, stride (time, height, width)) of a ComfyUI VAE; None when it does not tell."""
    try:
        time = vae.temporal_compression_decode() if getattr(vae, "latent_dim", 2) == 3 else 1
        space = vae.spacial_compression_decode()
        return int(vae.latent_channels), (int(time or 1), int(space), int(space))
    except (AttributeError, TypeError):
        return None


def describe_vae(geometry: tuple[int, tuple[int, int, int]]) -> str:
    """A short text like '16 channels, 4x8x8 pixels a latent'."""
    return f"{geometry[0]} channels, {'x'.join(map(str, geometry[1]))} pixels a latent"


def require_vae(vae: object, expected: VaeSpec, name: str = "The VAE") -> None:
    """Refuse a VAE whose channels or stride differ from ``expected``."""
    found = vae_geometry(vae)
    if found is None or found != (expected.channels, expected.stride):
        raise SanaVideoError(
            f"{name} does not fit the model",
            found="a VAE without video latents" if found is None else describe_vae(found),
            expected=f"{describe_vae((expected.channels, expected.stride))} ({expected.name})",
            action=f"Choose {expected.file_hint}")


def file_stamp(folder: str, name: str | None) -> str:
    """Size and time of a file in a ComfyUI model folder, "" when none is named: changes when the file is replaced."""
    import folder_paths

    path = None if name in (None, NONE, EMBEDDED, EMBEDDED_LONG) else folder_paths.get_full_path(folder, name)
    if path is None or not Path(path).exists():
        return ""
    stat = Path(path).stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def embedded_folder() -> Path:
    """Where the embedded model's weights lie."""
    return Path(__file__).parent.parent / "sana_video_core" / "mini" / "weights"


def embedded_models() -> list[str]:
    """The entries of the model list that this copy of the pack carries: the clip model, the model for long video."""
    if not any(embedded_folder().glob("*.safetensors")):
        return []
    from ..sana_video_core import mini

    return [EMBEDDED, EMBEDDED_LONG] if "long" in mini.files() else [EMBEDDED]


def embedded_files(model: str = EMBEDDED) -> dict[str, str]:
    """{"transformer", "vae", "text"} -> path of the files of an embedded model."""
    from ..sana_video_core import mini

    files = {part: str(path) for part, path in mini.files().items()}
    long = files.pop("long", str(mini.FOLDER / mini.LONG))
    if model == EMBEDDED_LONG:
        files["transformer"] = long
    lost = [path for path in files.values() if not Path(path).is_file()]
    if lost:
        raise SanaVideoError("The embedded model is not complete", found=f"missing {', '.join(Path(p).name for p in lost)}",
                             action="Install the pack again")
    return files


def bring(patcher, memory: float) -> None:
    """Have ComfyUI load a model with so many bytes free beside it, unless it lies where that would bring it.

    Core's call copies a model's small weights anew even then. Before core may move weights, what still reads them is waited for.
    """
    import comfy.model_management as management
    import torch

    device = patcher.load_device
    mine = next((m for m in management.current_loaded_models if m.model is patcher), None)
    # A dynamic model is never loaded as a whole: its small weights are, and the others come when they are read.
    whole = mine is not None and patcher.model.current_weight_patches_uuid == patcher.patches_uuid and (
        bool(patcher.backup) if patcher.is_dynamic() else mine.model_offloaded_memory() == 0)
    free, cached = management.get_free_memory(device, torch_free_too=True)
    room = free if device.type == "cpu" else free - cached  # core empties torch's cache where memory is short
    if whole and room >= max(management.minimum_inference_memory(), memory + management.extra_reserved_memory()):
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    management.load_models_gpu([patcher], memory_required=memory)
