"""The operators the network is made of. Call these; the registry chooses the backend."""

from . import fused, reference
from .reference import Contribution
from .registry import OPERATORS, Constraint, Operator, force, operator, report

rms_norm = operator(reference.rms_norm)
modulate_norm = operator(reference.modulate_norm)
gated_residual = operator(reference.gated_residual)
linear_attention = operator(reference.linear_attention)
softmax_attention = operator(reference.softmax_attention)
gated_depthwise = operator(reference.gated_depthwise)
temporal_taps = operator(reference.temporal_taps)

fused.register(OPERATORS)

__all__ = [
    "OPERATORS", "Constraint", "Contribution", "Operator", "force", "gated_depthwise", "gated_residual",
    "linear_attention", "modulate_norm", "operator", "report", "rms_norm", "softmax_attention", "temporal_taps",
]
