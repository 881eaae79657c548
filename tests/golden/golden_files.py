"""Golden files: finding them, telling what they are, weights that belong to them, and the book-keeping of comparisons.

What a file is follows from its metadata and keys, never from its name. A case and its weights belong together when their
``weight_seed`` is equal; a case without one takes the weights of the same network sizes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_video_core.checkpoint import convert
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.specs import ModelSpec, VaeSpec


class GoldenError(Exception):
    """A golden file that cannot be checked as it stands: a failure of its row, with the reason."""


class Unsupported(Exception):
    """A kind of file, or a part of it, that this version cannot check."""


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance in float64; infinite when shapes differ or anything is not finite."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().double(), expected.double()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite when shapes differ or anything is not finite."""
    if found.shape != expected.shape:
        return math.inf
    error = float((found.detach().double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return error if math.isfinite(error) else math.inf


@dataclass
class Check:
    """One comparison; it holds when ``error <= tolerance``."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    @property
    def strain(self) -> float:
        """How much of the tolerance is used up."""
        return self.error / self.tolerance if self.tolerance else (0.0 if self.error == 0 else math.inf)


@dataclass
class Report:
    """The comparisons of one file, and remarks for its row."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def worst(self, *parts: str) -> float:
        """Largest error of the comparisons in float32 whose name holds one of ``parts``."""
        return max((c.error for c in self.checks if "bf16" not in c.name and any(p in c.name for p in parts)), default=0.0)

    def rel(self, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        self.checks.append(Check(name, relative(found, expected), tolerance))

    def abs(self, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        self.checks.append(Check(name, largest(found, expected), tolerance))

    def exact(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Equal in dtype, shape and every bit."""
        same = found.dtype == expected.dtype and torch.equal(found, expected)
        self.checks.append(Check(name, 0.0 if same else max(largest(found, expected), 1e-30), 0.0))

    def that(self, name: str, holds: bool) -> None:
        self.checks.append(Check(name, 0.0 if holds else math.inf, 0.0))


class Tensors:
    """The tensors of a file by key, read once; remembers which were asked for."""

    def __init__(self, path: Path):
        self._path, self._cache, self.used = path, {}, set()
        with safe_open(path, "pt") as f:
            self.keys = list(f.keys())

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        if key not in self._cache:
            with safe_open(self._path, "pt") as f:
                if key not in self.keys:
                    raise GoldenError(f"the tensor {key} is missing")
                self._cache[key] = f.get_tensor(key)
        return self._cache[key]

    def get(self, key: str) -> Tensor | None:
        return self[key] if key in self else None

    def matching(self, pattern: str) -> Iterator[tuple[re.Match, Tensor]]:
        """(match, tensor) of all keys that the whole pattern fits."""
        for key in self.keys:
            if match := re.fullmatch(pattern, key):
                yield match, self[key]

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix):]: self[k] for k in self.keys if k.startswith(prefix)}

    def unread(self) -> list[str]:
        return sorted(set(self.keys) - self.used)


class Golden:
    """One safetensors file: ``info`` is its metadata with JSON values decoded (``meta`` and ``config`` unfolded)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt") as f:
                raw = f.metadata() or {}
            self.tensors = Tensors(path)
        except (SafetensorError, OSError) as e:
            raise GoldenError(f"cannot be read: {e}") from None
        self.info = {k: _decoded(v) for k, v in raw.items()}
        if isinstance(self.info.get("meta"), dict):
            self.info = {**self.info, **self.info.pop("meta")}
        self.config = self.info.get("config") if isinstance(self.info.get("config"), dict) else {}
        self.case = self.info.get("case") if isinstance(self.info.get("case"), dict) else {}

    @property
    def name(self) -> str:
        return self.path.stem

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, k) for k in self.tensors.keys)

    @property
    def weight_seed(self):
        return self.config.get("weight_seed")

    @property
    def sized(self) -> bool:
        """True when the metadata tells the sizes of a 2B network."""
        return "hidden_size" in sizes(self.config)

    @property
    def naming(self) -> str:
        """Of a weights file."""
        return "diffusers" if "patch_embedding.weight" in self.tensors else "original"

    @property
    def kind(self) -> str:
        """What to do with the file; see :data:`KINDS`."""
        for kind, test in KINDS:
            if test(self):
                return kind
        return "unknown"


def _decoded(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _described(g: Golden, word: str) -> bool:
    return str(g.info.get("kind", "")).lower().startswith(word)


KINDS = (
    ("hybrid (SANA-Video 2.0)", lambda g: "softmax_ratio" in g.config),
    ("weights", lambda g: "x_embedder.proj.weight" in g.tensors or "patch_embedding.weight" in g.tensors),
    ("forward", lambda g: "timestep" in g.case),
    ("sampler", lambda g: "cfg_scale" in g.case),
    ("schedules", lambda g: "shift" in g.info and "steps" in g.info),
    ("interactive", lambda g: "prompt_blocks" in g.config),
    ("sampling", lambda g: "denoising_step_list" in g.config),
    ("chunked forward", lambda g: g.has(r"chunk\d+/kv_in/.*") or g.has(r"chunk\d+/out_t0_save")),
    ("chunked modules", lambda g: g.has(r"chunk\d+/attn_out")),
    ("level tables", lambda g: "note" in g.config and g.has(r"shift.*/sigmas")),
    ("block times", lambda g: "note" in g.config and g.has(r".*/log_mat_s")),
    ("wan vae", lambda g: _described(g, "wan")),
    ("gemma", lambda g: _described(g, "gemma")),
    ("LTX VAE", lambda g: _described(g, "ltx")),
    ("DC-AE-V", lambda g: _described(g, "dc-ae")),
)
NAMINGS = ("original", "diffusers")
NOT_YET = ("hybrid (SANA-Video 2.0)", "LTX VAE", "DC-AE-V", "unknown")


def sizes(config: dict) -> dict:
    """The network sizes in the metadata of a model or a causal file."""
    inner = config.get("model", config)
    return inner if isinstance(inner, dict) else {}


def spec_of(config: dict) -> ModelSpec:
    """The spec of a golden network."""
    c = sizes(config)
    try:
        width, patch = int(c["hidden_size"]), tuple(int(p) for p in c["patch_size"])
        return ModelSpec(
            name="golden", depth=int(c["depth"]), width=width, linear_head_dim=int(c["linear_head_dim"]),
            cross_heads=int(c["num_heads"]), ffn_hidden=int(width * c["mlp_ratio"]), channels=int(c["in_channels"]),
            patch=patch, caption_channels=int(c["caption_channels"]), caption_tokens=int(c["model_max_length"]),
            vae=VaeSpec("golden", int(c["in_channels"]), (4, 8, 8), "the golden latents"),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise GoldenError(f"the network sizes in the metadata cannot be read: {e!r}") from None


class Weights:
    """The weight files of a directory."""

    def __init__(self, files: list[Golden]):
        self.files = files

    def alternatives(self, case: Golden) -> list[Weights]:
        """What to try for ``case``: all files, or one seed at a time where several could be meant by a case without one."""
        seeds = {w.weight_seed for w in self.files if sizes(w.config) == sizes(case.config)}
        if case.weight_seed is not None or not case.sized or len(seeds) < 2:
            return [self]
        return [Weights([w for w in self.files if w.weight_seed == seed]) for seed in sorted(seeds, key=str)]

    def of(self, case: Golden) -> list[Golden]:
        """The files that belong to ``case``: those of its seed, or of its sizes when it has none."""
        if case.weight_seed is not None:
            found = [w for w in self.files if w.weight_seed == case.weight_seed]
            found = [w for w in found if sizes(w.config) == sizes(case.config)] or found
            wanted = f"weight_seed {case.weight_seed}"
        else:
            found = [w for w in self.files if sizes(w.config) == sizes(case.config)]
            wanted = "the same network sizes"
        if not found:
            raise GoldenError(f"no weights with {wanted} in this directory")
        return found

    def in_both_namings(self, case: Golden) -> dict[str, dict[str, Tensor]]:
        """{naming: state dict} for ``case``: read where a file has that naming, otherwise converted from the other."""
        files = {w.naming: w.tensors.prefixed("") for w in self.of(case)}
        spec = spec_of(case.config)
        return {name: files[name] if name in files else convert(next(iter(files.values())), spec, name) for name in NAMINGS}

    def state(self, case: Golden) -> dict[str, Tensor]:
        """The weights of ``case`` under the official names."""
        return self.in_both_namings(case)["original"]


def network(state: dict[str, Tensor], config: dict, *, dtype=torch.float32, **options) -> SanaVideoTransformer:
    """The network with the weights ``state`` in any naming; options of SanaVideoTransformer."""
    spec = spec_of(config)
    model = SanaVideoTransformer(spec, dtype=dtype, **options)
    model.load_state_dict({k: v.to(dtype) for k, v in convert(state, spec).items()})
    return model.eval().requires_grad_(False)
