"""The one table of weight names: official, diffusers, and the network's own, with shapes (model spec 2.1, 2.2).

``original``: the names and convolution shapes of the official files. ``native``: the same names, but 1x1, patch and temporal
convolutions stored as matrices, as the network holds them. ``diffusers``: other names, merged projections split along rows.
Plain data: no torch here, so LoRA names, quantisation and checkpoints share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

from ..specs import ModelSpec

NAMINGS = ("native", "original", "diffusers")
TIME_WIDTH = 256  # width of the time sinusoid
TAPS = 3  # of the temporal convolution

# Module names: ours -> diffusers'.
TOP = {
    "x_embedder.proj": "patch_embedding",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
    "mlp.t_conv": "ff.conv_temp",
}
# Merged in ours, split along the first axis in diffusers', in this order.
SLICES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
# Raw parameters, which are no modules.
TABLES = {"final_layer.scale_shift_table": "scale_shift_table"}
BLOCK_TABLE = "scale_shift_table"

# In official files, not read by the network: position table, null prompt, loss weights of the training.
UNUSED = re.compile(r"(pos_embed|y_embedder\.y_embedding|logvar_linear\.(weight|bias))")
# Tensors beside the weight of a quantised layer (comfyui spec 5.2).
QUANT_SUFFIXES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")
BLOCK_NAME = re.compile(r"(?:transformer_)?blocks\.(\d{1,6})\.")


class Entry(NamedTuple):
    """A parameter of the network: its shape in the two shapes of our naming, and its diffusers name (or its parts')."""

    original: tuple[int, ...]
    native: tuple[int, ...]
    diffusers: tuple[str, ...]

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of each diffusers tensor."""
        return (self.original[0] // len(self.diffusers), *self.original[1:])


@lru_cache(maxsize=32)
def key_table(spec: ModelSpec) -> dict[str, Entry]:
    """{parameter name: Entry} of the 2B family, in the order of the network. Do not change the result."""
    table: dict[str, Entry] = {}
    for module, (shape, bias) in _top(spec).items():
        _add(table, module, (TOP[module],), shape, bias)
    for ours, theirs in TABLES.items():
        table[ours] = Entry((2, spec.width), (2, spec.width), (theirs,))
    layers = _block(spec)
    for i in range(spec.depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        table[ours + BLOCK_TABLE] = Entry((6, spec.width), (6, spec.width), (theirs + BLOCK_TABLE,))
        for module, (shape, bias) in layers.items():
            parts = SLICES.get(module) or (BLOCK[module],)
            _add(table, ours + module, tuple(theirs + part for part in parts), shape, bias)
    return table


def _top(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], bool]]:
    """{module: (original weight shape, has a bias)} outside the blocks."""
    d, c = spec.width, spec.channels
    return {
        "x_embedder.proj": ((d, c, *spec.patch), True),
        "t_embedder.mlp.0": ((d, TIME_WIDTH), True),
        "t_embedder.mlp.2": ((d, d), True),
        "t_block.1": ((6 * d, d), True),
        "y_embedder.y_proj.fc1": ((d, spec.caption_channels), True),
        "y_embedder.y_proj.fc2": ((d, d), True),
        "attention_y_norm": ((d,), False),
        "final_layer.linear": ((math.prod(spec.patch) * c, d), True),
    }


def _block(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], bool]]:
    """{module: (original weight shape, has a bias)} of one block."""
    d, e = spec.width, spec.ffn_hidden
    return {
        "attn.qkv": ((3 * d, d), False),
        "attn.q_norm": ((d,), False),
        "attn.k_norm": ((d,), False),
        "attn.proj": ((d, d), True),
        "cross_attn.q_linear": ((d, d), True),
        "cross_attn.kv_linear": ((2 * d, d), True),
        "cross_attn.q_norm": ((d,), False),
        "cross_attn.k_norm": ((d,), False),
        "cross_attn.proj": ((d, d), True),
        "mlp.inverted_conv.conv": ((2 * e, d, 1, 1), True),
        "mlp.depth_conv.conv": ((2 * e, 1, 3, 3), True),
        "mlp.point_conv.conv": ((d, e, 1, 1), False),
        "mlp.t_conv": ((d, d, TAPS, 1), False),
    }


def _add(table: dict[str, Entry], module: str, theirs: tuple[str, ...], shape: tuple[int, ...], bias: bool) -> None:
    native = shape if module.endswith("depth_conv.conv") else (shape[0], math.prod(shape[1:]))[:len(shape)]
    table[f"{module}.weight"] = Entry(shape, native, tuple(f"{name}.weight" for name in theirs))
    if bias:
        table[f"{module}.bias"] = Entry(shape[:1], shape[:1], tuple(f"{name}.bias" for name in theirs))


def naming_of(names: Iterable[str]) -> str:
    """'diffusers' or 'original' (which covers native: same names), by the majority of the names."""
    ours = theirs = 0
    for name in names:
        theirs += name.startswith(("transformer_blocks.", "patch_embedding.", "time_embed.", "caption_", "proj_out."))
        ours += name.startswith(("blocks.", "x_embedder.", "t_embedder.", "t_block.", "y_embedder.", "final_layer."))
    return "diffusers" if theirs > ours else "original"


def block_count(names: Iterable[str]) -> int:
    """How many different blocks the names speak of."""
    return len({match[1] for name in names if (match := BLOCK_NAME.match(name))})


def quantised_layers(names: Collection[str]) -> set[str]:
    """Layer names out of layer names, '.comfy_quant' marks and the other tensors of quantised layers."""
    layers = set()
    for name in names:
        suffix = next((s for s in QUANT_SUFFIXES if name.endswith(s)), "")
        layers.add(name[:len(name) - len(suffix)])
    return layers
