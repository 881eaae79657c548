"""The Linear DiT of SANA-Video (2B family), bidirectional and block-causal in one class."""

from .model import SanaVideoTransformer

__all__ = ["SanaVideoTransformer"]
