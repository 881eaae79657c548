"""The ComfyUI side of the pack: one small file a stage. Importing it needs neither a GPU nor ``comfy.model_management``."""

from __future__ import annotations

from .decode import SanaVideoDecode
from .first_frame import SanaVideoFirstFrame
from .latent import SanaVideoEmptyLatent
from .loader import SanaVideoLoader
from .lora import SanaVideoLoadLora
from .sampler import SanaVideoSampler, SanaVideoSigmas
from .text import SanaVideoTextEncode

# The order is that of a graph from left to right. Ids are forever; inputs are only appended.
NODES = [
    SanaVideoLoader,
    SanaVideoLoadLora,
    SanaVideoTextEncode,
    SanaVideoEmptyLatent,
    SanaVideoFirstFrame,
    SanaVideoSampler,
    SanaVideoSigmas,
    SanaVideoDecode,
]

__all__ = ["NODES"]
