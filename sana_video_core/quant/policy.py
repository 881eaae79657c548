"""Which layers are stored in few bits, in which format, and which are not, as data. No torch here.

Sources: performance spec 1.1 and 3 (the mixed policy of SANA-Streaming, arXiv 2605.30409, and what to keep), model spec 6.1.
The layers of ``KEPT`` and everything that is no matrix (norms, tables, biases, the depthwise convolution) keep the precision
of the model: together an eighth of the 2B network's weights.
"""

from __future__ import annotations

from typing import NamedTuple

from ..checkpoint.keys import BLOCK_NAME, key_table
from ..errors import SanaVideoError
from ..specs import ModelSpec

ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj")
FFN = ("mlp.inverted_conv.conv", "mlp.point_conv.conv", "mlp.t_conv")
# The layer that reads the residual stream itself: the image model of this family is known for single values beyond 1e5 there,
# and one scale for all of such an input would leave the others few bits. An eighteenth of the work.
RESIDUAL = ("cross_attn.q_linear",)

KEPT = {
    "x_embedder.proj": "reads the latent itself",
    "t_embedder.mlp.0": "the time steers every token of every block",
    "t_embedder.mlp.2": "the time steers every token of every block",
    "t_block.1": "makes the shifts, scales and gates of all blocks",
    "y_embedder.y_proj.fc1": "runs once over 300 text tokens: no time to win",
    "y_embedder.y_proj.fc2": "runs once over 300 text tokens: no time to win",
    "cross_attn.kv_linear": "keys and values of the text: few tokens that every pixel reads",
    "final_layer.linear": "writes the velocity itself",
}


class Mark(NamedTuple):
    """How one layer is stored: ``format`` is ComfyUI's name of it, ``options`` the further entries of its JSON mark."""

    format: str
    options: dict


class Rule(NamedTuple):
    """``layers`` of every block in the given format. ``late`` leaves out the first ``EARLY`` of the blocks."""

    layers: tuple[str, ...]
    format: str
    options: dict = {}  # read only
    late: bool = False


EARLY = 0.3  # share of the blocks whose FFN keeps 8 bits in the 4-bit policy: 6 of 20
ROTATION = 64  # largest group of int8's input rotation: ComfyUI's usual 256 does not divide 2240

# The first rule that fits a layer counts.
POLICIES: dict[str, tuple[Rule, ...]] = {
    "fp8": (Rule(RESIDUAL, "float8_e4m3fn", {"full_precision_matrix_mult": True}), Rule(ATTENTION + FFN, "float8_e4m3fn")),
    "int8": (Rule(ATTENTION + FFN, "int8_tensorwise", {"convrot": True}),),
    "mxfp8": (Rule(ATTENTION + FFN, "mxfp8"),),
    "nvfp4": (Rule(("cross_attn.proj",), "nvfp4"), Rule(FFN, "nvfp4", late=True), Rule(ATTENTION + FFN, "mxfp8")),
}


def formats_of(precision: str) -> set[str]:
    """ComfyUI's names of the formats that a policy uses."""
    return {rule.format for rule in POLICIES[precision]}


def plan(spec: ModelSpec, precision: str) -> dict[str, Mark]:
    """{layer: Mark} of every layer that ``precision`` (a key of POLICIES) stores in few bits, in the order of the network."""
    if precision not in POLICIES:
        raise SanaVideoError("There is no low-bit precision of that name", found=precision, expected=", ".join(POLICIES))
    marks: dict[str, Mark] = {}
    for key, entry in key_table(spec).items():
        layer = key.removesuffix(".weight")
        block = BLOCK_NAME.match(layer)
        if block is None or layer == key:
            continue
        late = int(block[1]) >= round(EARLY * spec.depth)
        rule = next((r for r in POLICIES[precision] if layer[block.end():] in r.layers and (late or not r.late)), None)
        if rule is not None:
            marks[layer] = Mark(rule.format, _options(rule, entry.native[1]))
    return marks


def _options(rule: Rule, columns: int) -> dict:
    """The rule's options for a layer with that many inputs; a rotation gets the largest group (a power of 4) that fits."""
    if not rule.options.get("convrot"):
        return dict(rule.options)
    group = next((g for g in (ROTATION, 16, 4) if columns % g == 0), None)
    return {} if group is None else rule.options | {"convrot_groupsize": group}
