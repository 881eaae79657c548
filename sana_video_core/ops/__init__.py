"""The operators the network is made of. Call these; the registry chooses the backend."""

from . import (
    frames,
    frames_cpu,
    frames_fused,
    fused,
    fused_torch,
    library,
    linear_fused,
    onto,
    onto_fp8,
    onto_fused,
    pairs,
    pairs_fused,
    reference,
    softmax_fused,
)
from .onto import Onto, Shifted
from .onto_fp8 import OntoRows
from .pairs import AlongTime
from .reference import Contribution, Rows
from .registry import OPERATORS, Constraint, Operator, force, operator, report

rms_norm = operator(reference.rms_norm)
modulate_norm = operator(reference.modulate_norm)
gated_residual = operator(reference.gated_residual)
residual_norm = operator(reference.residual_norm)
linear_attention = operator(reference.linear_attention)
softmax_attention = operator(reference.softmax_attention)
gated_depthwise = operator(reference.gated_depthwise)
temporal_taps = operator(reference.temporal_taps)
time_pairs = operator(pairs.time_pairs)
pair_weights = operator(pairs.pair_weights)
pair_residual = operator(pairs.pair_residual)
add_product = operator(onto.add_product)
shifted_product = operator(onto.shifted_product)
row_fp8 = operator(reference.row_fp8)
scaled_fp8 = operator(reference.scaled_fp8)
given_fp8 = operator(reference.given_fp8)
modulate_norm_fp8 = operator(reference.modulate_norm_fp8)
residual_norm_fp8 = operator(reference.residual_norm_fp8)
gated_residual_fp8 = operator(reference.gated_residual_fp8)
temporal_taps_fp8 = operator(reference.temporal_taps_fp8)
framed_fp8 = operator(onto_fp8.framed_fp8)
add_product_fp8 = operator(onto_fp8.add_product_fp8)
open_window = operator(frames.open_window)
open_pairs = operator(frames.open_pairs)
frame_weights = operator(frames.frame_weights)
pair_conv = operator(frames.pair_conv)
causal_step = operator(frames.causal_step)
time_double = operator(frames.time_double)
upsample_conv = operator(frames.upsample_conv)
pixel_conv = operator(frames.pixel_conv)
frame_attention = operator(frames.frame_attention)

linear_fused.register(OPERATORS)
softmax_fused.register(OPERATORS)
fused.register(OPERATORS)
fused_torch.register(OPERATORS)
library.register(OPERATORS)
pairs_fused.register(OPERATORS)
onto_fused.register(OPERATORS)
frames_fused.register(OPERATORS)
frames_cpu.register(OPERATORS)

__all__ = [
    "OPERATORS", "AlongTime", "Constraint", "Contribution", "Onto", "OntoRows", "Operator", "Rows", "Shifted", "add_product",
    "add_product_fp8", "causal_step", "force", "frame_attention", "frame_weights", "framed_fp8", "gated_depthwise",
    "gated_residual", "gated_residual_fp8", "given_fp8", "linear_attention", "modulate_norm", "modulate_norm_fp8", "open_pairs",
    "open_window", "operator", "pair_conv", "pair_residual", "pair_weights", "pixel_conv", "report", "residual_norm",
    "residual_norm_fp8", "rms_norm", "row_fp8", "scaled_fp8", "shifted_product", "softmax_attention", "temporal_taps",
    "temporal_taps_fp8", "time_double", "time_pairs", "upsample_conv",
]
