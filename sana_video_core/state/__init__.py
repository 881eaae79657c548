"""The recurrent state: everything that has to be known of the past to continue a video."""

from .recurrent import STATE_VERSION, LayerState, RecurrentState, Undo, check_fits, layers_on, map_tensors, tensors

__all__ = ["STATE_VERSION", "LayerState", "RecurrentState", "Undo", "check_fits", "layers_on", "map_tensors", "tensors"]
