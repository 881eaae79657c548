"""The recurrent state: everything that has to be known of the past to continue a video."""

from .recurrent import STATE_VERSION, LayerState, RecurrentState, check_fits

__all__ = ["STATE_VERSION", "LayerState", "RecurrentState", "check_fits"]
