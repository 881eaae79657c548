"""SANA-Video in plain torch: network, samplers, VAE, text, state. Imports neither ComfyUI nor Triton.

``import sana_video_core as svc`` then ``svc.SPECS``, ``svc.load_transformer(path)``.
"""

from .errors import CheckpointError, SanaVideoError, StateError
from .specs import SPECS, ModelSpec, get_spec

__version__ = "0.1.0"


def load_transformer(*args, **kwargs):
    """See ``sana_video_core.checkpoint.load_transformer`` (imported on use, to keep the import of the core light)."""
    from .checkpoint import load_transformer as load

    return load(*args, **kwargs)


__all__ = ["SPECS", "CheckpointError", "ModelSpec", "SanaVideoError", "StateError", "get_spec", "load_transformer"]
