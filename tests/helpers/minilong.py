"""The embedded model for long video in a server of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

from sana_video_core import mini

STAND_IN = "mini_stand_in.safetensors"
FOLDERS = {"transformer": "diffusion_models", "text": "text_encoders", "vae": "vae"}


def loader_inputs(models: Path) -> dict[str, str]:
    """Inputs of 'Load SANA-Video' for the embedded model for long video.

    A checkout without its weights gets the clip model in its place, in long mode, as files in ComfyUI's ``models`` folder:
    the same network and sizes, so everything but the picture is the same.
    """
    if "long" in mini.files():
        return {"model": "embedded mini long", "text_encoder": "none", "vae": "none", "mode": "auto"}
    for part, folder in FOLDERS.items():
        target = models / folder / STAND_IN
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mini.files()[part], target)
    return {"model": STAND_IN, "text_encoder": STAND_IN, "vae": STAND_IN, "mode": "long"}
