"""Which model a table of weights is: from the tensors first, then from what the file says about itself.

Sizes come from the shapes. Two things the shapes cannot tell. *Heads* (how the channels are grouped): from the file's own
``sana_video_spec``, else from a diffusers config, else from the public row of the same width; otherwise the file is refused,
because wrong heads give noise without an error. *Clip or long* (LongSANA and the 480p model share every name and shape): a
visible choice of the user beats all, then ``sana_video_spec``, the wrapper 'generator', the diffusers class, and last the
file's name, which is said in the log.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError, SanaVideoError
from ..specs import LTX2, SPECS, WAN21, ModelSpec, VaeSpec
from .families import refuse_foreign, refuse_unknown
from .header import damaged, strict_json
from .keys import BLOCK, BLOCK_NAME, BLOCK_TABLE, SLICES, TABLES, TOP, block_count, naming_of
from .source import CONFIG_KEY, OUR_CLASSES, SPEC_KEY

log = logging.getLogger(__name__)

HINTS = {"clip": False, "long": True}
# Values a patch can hold tell channels and patch where the patch embedding is a matrix (no other public latents exist).
LATENTS = {64: (16, (1, 2, 2)), 128: (128, (1, 1, 1))}
_LONG_NAME = re.compile(r"longsana|longlive|self[-_ ]?forcing|(^|[-_. ])ode([-_. ]|$)", re.IGNORECASE)
_LONG_VALUES = {"flow_shift": 7.0, "cfg": 1.0, "steps": 4}
_CLIP_VALUES = {"flow_shift": 8.0, "cfg": 6.0, "steps": 50}
_SIZES = ("depth", "width", "ffn_hidden", "caption_channels", "channels", "patch")


class Facts(NamedTuple):
    """What the shapes tell. ``channels`` and ``patch`` are None when only their product ``patch_values`` is known."""

    depth: int
    width: int
    ffn_hidden: int
    caption_channels: int
    channels: int | None
    patch: tuple[int, int, int] | None
    patch_values: int


def detect_spec(
    shapes: Mapping[str, tuple[int, ...]], *, metadata: Mapping[str, str] | None = None, container: str | None = None,
    path: str | None = None, hint: str | None = None,
) -> ModelSpec:
    """The ModelSpec of weights with these names and shapes, in any naming; CheckpointError for any other model.

    metadata:  the file's texts (``Source.metadata``): 'sana_video_spec' and 'diffusers_config' are read.
    container: ``Source.container``; a wrapper 'generator' means LongSANA.
    path:      for messages, and as the last resort for clip or long.
    hint:      'clip' or 'long' decides that question; None leaves it to the file.
    """
    if hint is not None and hint not in HINTS:
        raise SanaVideoError("Unknown mode", found=hint, expected=", ".join(HINTS))
    metadata, name = metadata or {}, Path(path).name if path else ""
    refuse_foreign(shapes, name)
    if not _is_ours(shapes):
        refuse_unknown(shapes, name)
    if SPEC_KEY in metadata:
        spec, told = spec_from_text(metadata[SPEC_KEY], name), "the file's own description"
    else:
        config = _config(metadata, name)
        spec = _row(read_facts(shapes, name), config, name)
        spec, told = _mode(spec, config, container, name)
    if spec.hybrid:
        raise CheckpointError(f"The file {name} is {spec.name}, which this version cannot run yet",
                              action="Choose a SANA-Video 2B file")
    if hint is not None:
        spec, told = as_mode(spec, HINTS[hint]), "the chosen mode"
    log.info("%s: %s, %s mode by %s", name or "weights", spec.name, "long" if spec.causal else "clip", told)
    return spec


def as_mode(spec: ModelSpec, causal: bool) -> ModelSpec:
    """``spec`` for clips or for long video: the public row of the same network, else the same with the mode's usual values."""
    if spec.causal == causal:
        return spec
    for row in SPECS.values():
        if row.causal == causal and _network(row) == _network(spec):
            return row
    name = f"{spec.name}-long" if causal else spec.name.removesuffix("-long")
    return replace(spec, name=name, causal=causal, **(_LONG_VALUES if causal else _CLIP_VALUES))


def _network(spec: ModelSpec) -> tuple:
    return (spec.linear_head_dim, spec.cross_heads, spec.hybrid, *(getattr(spec, size) for size in _SIZES))


def _is_ours(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True when the file speaks of the layers that only this family has together."""
    mix = (".mlp.t_conv.weight", ".ff.conv_temp.weight", ".mlp.depth_conv.conv.weight", ".ff.conv_depth.weight")
    return any(key.endswith(mix) for key in shapes) and any(BLOCK_NAME.match(key) for key in shapes)


def read_facts(shapes: Mapping[str, tuple[int, ...]], name: str = "") -> Facts:
    """Sizes out of tensors that quantisation leaves alone; each by the vote of all that know it, so that one damaged entry
    does not mislead (the key table then names it)."""
    diffusers = naming_of(shapes) == "diffusers"
    depth = block_count(shapes)
    blocks = [f"{'transformer_' if diffusers else ''}blocks.{i}." for i in range(depth)]

    def top(ours: str, kind: str) -> list[str]:
        return [f"{TOP[ours] if diffusers else ours}.{kind}"]

    def block(ours: str, kind: str) -> list[str]:
        parts = (BLOCK.get(ours) or SLICES[ours][0]) if diffusers else ours
        return [f"{b}{parts}.{kind}" for b in blocks]

    norms = [key for layer in ("attn.q_norm", "attn.k_norm", "cross_attn.q_norm") for key in block(layer, "weight")]
    tables = [b + BLOCK_TABLE for b in blocks] + [TABLES["final_layer.scale_shift_table"] if diffusers else
                                                  "final_layer.scale_shift_table"]
    width = _vote(shapes, norms + tables + top("attention_y_norm", "weight"), -1, name)
    hidden = _vote(shapes, block("mlp.depth_conv.conv", "bias") + block("mlp.depth_conv.conv", "weight"), 0, name) // 2
    caption = _vote(shapes, top("y_embedder.y_proj.fc1", "weight"), 1, name)
    values = _vote(shapes, top("final_layer.linear", "bias") + top("final_layer.linear", "weight"), 0, name)
    patches = shapes.get(top("x_embedder.proj", "weight")[0], ())
    if len(patches) == 5 and math.prod(patches[1:]) == values:
        return Facts(depth, width, hidden, caption, patches[1], tuple(patches[2:]), values)
    channels, patch = LATENTS.get(values, (None, None))
    return Facts(depth, width, hidden, caption, channels, patch, values)


def _vote(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], axis: int, name: str) -> int:
    names = list(names)
    sizes = Counter(shapes[key][axis] for key in names if key in shapes and len(shapes[key]) > max(axis, 0))
    if not sizes:
        raise CheckpointError(f"The checkpoint {name} is not complete".replace("  ", " "),
                              found=f"no usable tensor {names[0]}", action="Download the file again")
    return sizes.most_common(1)[0][0]


def _row(facts: Facts, config: dict | None, name: str) -> ModelSpec:
    """The public row with these sizes, else a row of our own with heads from the config or from the width."""
    clips = [row for row in SPECS.values() if not row.hybrid and not row.causal]
    heads = _config_heads(facts, config, name)
    for row in clips:
        same = (row.depth, row.width, row.ffn_hidden, row.channels, row.patch) == (
            facts.depth, facts.width, facts.ffn_hidden, facts.channels, facts.patch)
        # a packed (nvfp4) caption layer has half the columns
        packed = row.caption_channels == 2 * facts.caption_channels
        if same and (packed or row.caption_channels == facts.caption_channels):
            if heads in (None, (row.linear_head_dim, row.cross_heads)):
                return row
    heads = heads or next(((row.linear_head_dim, row.cross_heads) for row in clips if row.width == facts.width), None)
    if heads is None or facts.channels is None:
        raise CheckpointError(
            f"The file {name} is of the SANA-Video family, but of a size whose heads are not known".replace("  ", " "),
            found=f"depth {facts.depth}, width {facts.width}, {facts.patch_values} values a patch",
            expected=f"width {' or '.join(str(w) for w in sorted({row.width for row in clips}))}, or a file that tells its sizes",
            action=f"Save it with save_transformer, which writes the metadata entry '{SPEC_KEY}', or load its diffusers folder")
    vae = {16: WAN21, 128: LTX2}.get(facts.channels) or VaeSpec(
        f"an unknown VAE of {facts.channels} channels", facts.channels, WAN21.stride, "the VAE it was trained with")
    base = next((row for row in clips if row.width == facts.width and row.vae == vae), SPECS["sana-video-2b-480p"])
    sizes = {size: getattr(facts, size) for size in _SIZES}
    return replace(base, name=f"sana-video-{facts.depth}x{facts.width}", linear_head_dim=heads[0], cross_heads=heads[1], vae=vae,
                   **sizes)


def _config_heads(facts: Facts, config: dict | None, name: str) -> tuple[int, int] | None:
    """(linear head dim, cross heads) of a diffusers config, checked against the width; None without a config."""
    if not config or "attention_head_dim" not in config:
        return None
    dim, heads = config["attention_head_dim"], config.get("num_attention_heads")
    cross = config.get("num_cross_attention_heads", heads)
    whole = all(type(n) is int and n > 0 for n in (dim, heads, cross))
    if not whole or dim * heads != facts.width or facts.width % cross or dim % 2:
        raise CheckpointError(f"The config.json of {name} does not belong to its weights",
                              found=f"{heads} heads of {dim}, {cross} cross attention heads", expected=f"width {facts.width}",
                              action="Download the folder again")
    return dim, cross


def _config(metadata: Mapping[str, str], name: str) -> dict | None:
    return strict_json(metadata[CONFIG_KEY].encode(), name) if CONFIG_KEY in metadata else None


def _mode(spec: ModelSpec, config: dict | None, container: str | None, name: str) -> tuple[ModelSpec, str]:
    """(spec in the mode that the file tells, how it told)."""
    class_name = (config or {}).get("_class_name")
    if ":generator" in (container or ""):
        return as_mode(spec, True), "the entry 'generator', which LongSANA's training writes"
    if class_name in OUR_CLASSES:
        return as_mode(spec, OUR_CLASSES[class_name]), f"the class {class_name}"
    twin = as_mode(spec, True)
    if spec.name in SPECS and twin.name not in SPECS:
        return spec, "its shapes"
    if _LONG_NAME.search(name):
        return twin, "the file's NAME (nothing in the file tells; choose the mode 'clip' if that is wrong)"
    return spec, "default (LongSANA looks the same from inside; choose the mode 'long' if it is one)"


def spec_to_text(spec: ModelSpec) -> str:
    """The JSON that our own files carry under 'sana_video_spec': every field, so that a later table cannot change it."""
    return json.dumps({"format": 1} | asdict(spec), sort_keys=True)


def spec_from_text(text: str, name: str = "") -> ModelSpec:
    """The inverse of :func:`spec_to_text`; unknown fields are ignored, wrong ones refused by name."""
    table = strict_json(text.encode(), name or "description")
    if table.get("format") != 1:
        raise CheckpointError(f"The file {name} describes its model in an unknown format", found=table.get("format"), expected=1,
                              action="Update this pack")
    vae = table.get("vae")
    if not isinstance(vae, dict):
        raise damaged(name, "a model description without a VAE")
    values = _typed(ModelSpec, table | {"vae": VaeSpec(**_typed(VaeSpec, vae, name))}, name)
    if min(values[size] for size in ("depth", "width", "ffn_hidden", "linear_head_dim", "cross_heads", "channels")) < 1:
        raise damaged(name, "a model description with a size of 0")
    try:
        return ModelSpec(**values)
    except SanaVideoError as error:
        raise damaged(name, str(error)) from error


def _typed(kind, table: Mapping, name: str) -> dict:
    """The fields of a spec class out of JSON values, each of the right type and of a sane size."""
    out = {}
    for entry in fields(kind):
        if entry.name not in table:
            if entry.default is MISSING:
                raise damaged(name, f"a model description without {entry.name!r}")
            continue
        value = table[entry.name]
        good, value = _CHECKS[str(entry.type).split("[")[0]](value)
        if not good or (isinstance(value, tuple) and len(value) != str(entry.type).count(",") + 1):
            raise damaged(name, f"a model description with {entry.name} = {str(value)[:60]!r}")
        out[entry.name] = value
    return out


def _number(value, low, high, kinds) -> bool:
    return type(value) in kinds and low <= value <= high


_CHECKS = {
    "str": lambda v: (isinstance(v, str) and 0 < len(v) <= 200, v),
    "int": lambda v: (_number(v, 0, 1_000_000, (int,)), v),
    "bool": lambda v: (type(v) is bool, v),
    "float": lambda v: (_number(v, 0.0, 1000.0, (int, float)), float(v) if _number(v, 0.0, 1000.0, (int, float)) else v),
    "tuple": lambda v: (isinstance(v, list) and all(_number(n, 1, 100_000, (int,)) for n in v),
                        tuple(v) if isinstance(v, list) else v),
    "VaeSpec": lambda v: (isinstance(v, VaeSpec), v),
}
