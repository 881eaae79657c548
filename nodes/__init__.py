"""The ComfyUI side of the pack: one small file a stage. Importing it needs neither a GPU nor ``comfy.model_management``."""

from __future__ import annotations

from .block_sampler import SanaVideoBlockSampler
from .calibrate import SanaVideoCalibrate
from .decode import SanaVideoDecode
from .first_frame import SanaVideoFirstFrame
from .latent import SanaVideoEmptyLatent
from .loader import SanaVideoLoader
from .lora import SanaVideoLoadLora
from .prefill import SanaVideoPrefillState
from .sampler import SanaVideoSampler, SanaVideoSigmas
from .schedule import SanaVideoPromptSchedule
from .state_carry import SanaVideoKVStateCarry
from .state_files import SanaVideoStateLoad, SanaVideoStateSave
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
    SanaVideoPromptSchedule,
    SanaVideoBlockSampler,
    SanaVideoKVStateCarry,
    SanaVideoStateSave,
    SanaVideoStateLoad,
    SanaVideoPrefillState,
    SanaVideoCalibrate,
]

__all__ = ["NODES"]
