"""What a film is made of, as data: settings, blocks, and the contract of every block (design 3.4).

A contract is a hash over the contract of the block before and everything that this block depends on. A block whose contract
is on disk need not be sampled again; a change at block k changes the contracts of k and all after it, and of none before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from ..errors import SanaVideoError, StateError
from ..sampling.plan import MAX_BLOCK_FRAMES, MAX_BLOCKS, BlockPlan
from ..state.atomic import best_algorithm, hasher

KIND, FORMAT = "SANA-Video film", 1
MAX_TEXT = 100_000


@dataclass(frozen=True)
class FilmSettings:
    """What is the same for all blocks. ``model``: fingerprint of the weights (without LoRAs).

    ``size``: latent height and width. ``recipe``: how a block is denoised, as JSON-able data. ``start``: fingerprint of the
    state that the film continues from ("" for a film of its own), ``index`` and ``position`` its first block and latent frame.
    """

    spec: str
    model: str
    size: tuple[int, int]
    recipe: dict
    window: int = 0
    recompute: bool = True
    precision: str = "quality"
    start: str = ""
    index: int = 0
    position: int = 0

    def __post_init__(self):
        object.__setattr__(self, "recipe", json.loads(json.dumps(self.recipe)))  # as it comes back from the file
        object.__setattr__(self, "size", tuple(self.size))


@dataclass(frozen=True)
class FilmBlock:
    """One block: latent ``frames``, ``seed``, ``caption`` (fingerprint of the texts as the network sees them), ``patches``
    (fingerprint of the LoRAs on the model). ``prompt`` and ``motion`` are for people."""

    frames: int
    seed: int
    caption: str
    patches: str = ""
    prompt: str = ""
    motion: int | None = None


@dataclass(frozen=True)
class FilmPlan:
    """A whole film. ``blocks[i]`` is block ``settings.index + i`` of the video."""

    settings: FilmSettings
    blocks: tuple[FilmBlock, ...]
    algorithm: str = field(default_factory=best_algorithm)

    @cached_property
    def contracts(self) -> tuple[str, ...]:
        """One hex digest a block, each over the one before."""
        chain, out = _digest(self.algorithm, {"film": FORMAT, **asdict(self.settings)}), []
        for block in self.blocks:
            chain = _digest(self.algorithm, {"before": chain, "frames": block.frames, "seed": block.seed,
                                             "caption": block.caption, "patches": block.patches})
            out.append(chain)
        return tuple(out)

    def block_plan(self) -> BlockPlan:
        return BlockPlan(tuple(b.frames for b in self.blocks), self.settings.index, self.settings.position)

    def edit(self, block: int, **changes) -> FilmPlan:
        """The plan with ``changes`` to one block (0 is the film's first)."""
        if not 0 <= block < len(self.blocks):
            raise SanaVideoError("The film has no such block", found=block + 1, expected=f"1 to {len(self.blocks)}")
        blocks = list(self.blocks)
        blocks[block] = replace(blocks[block], **changes)
        return replace(self, blocks=tuple(blocks))

    def switches(self, block: int, before: str = "") -> bool:
        """True when the text changes at ``block`` (then the state before it is not the one that the block before left).

        ``before``: the caption of the state that the film continues from."""
        previous = self.blocks[block - 1].caption if block else before
        return self.settings.recompute and previous not in ("", self.blocks[block].caption)

    def to_json(self) -> bytes:
        blocks = [{k: v for k, v in asdict(b).items() if v not in (None, "")} for b in self.blocks]
        data = {"kind": KIND, "format": FORMAT, "hash": self.algorithm, "settings": asdict(self.settings), "blocks": blocks}
        return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, raw: bytes, name: str = "film.json") -> FilmPlan:
        """Read and check a film.json; a field that makes no sense is named."""
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _broken(name, str(error)[:120]) from error
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise _broken(name, "not a film")
        if data.get("format") != FORMAT:
            raise StateError(f"{name} is of another version", found=data.get("format"), expected=FORMAT,
                             action="Open the film with the version of the pack that made it")
        try:
            settings = FilmSettings(**{**data["settings"], "size": tuple(data["settings"]["size"])})
            plan = cls(settings, tuple(FilmBlock(**b) for b in data["blocks"]), data["hash"])
        except (TypeError, KeyError) as error:
            raise _broken(name, str(error)[:120]) from error
        plan.check(name)
        return plan

    def check(self, name: str = "film.json") -> None:
        """Refuse a plan with fields of a wrong type or size."""
        s = self.settings
        texts = (s.spec, s.model, s.precision, s.start, self.algorithm)
        wrong = [] if all(type(t) is str and len(t) < 300 for t in texts) else ["settings"]
        wrong += [] if len(s.size) == 2 and all(_whole(n, 1, 1 << 16) for n in s.size) else ["size"]
        wrong += [] if all(_whole(n, 0, 1 << 40) for n in (s.index, s.position, s.window)) else ["index, position or window"]
        wrong += [] if isinstance(s.recipe, dict) and type(s.recompute) is bool else ["recipe or recompute"]
        wrong += [] if 1 <= len(self.blocks) <= MAX_BLOCKS else [f"{len(self.blocks)} blocks (1 to {MAX_BLOCKS})"]
        for i, b in enumerate(self.blocks):
            fits = (_whole(b.frames, 1, MAX_BLOCK_FRAMES) and _whole(b.seed, -(1 << 63), 1 << 64) and _text(b.caption, 300)
                    and _text(b.patches, 300) and _text(b.prompt, MAX_TEXT) and (b.motion is None or _whole(b.motion, -1, 1000)))
            wrong += [] if fits else [f"block {i + 1}"]
        if wrong:
            raise _broken(name, ", ".join(wrong[:4]))


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _text(value: object, longest: int) -> bool:
    return type(value) is str and len(value) <= longest


def _broken(name: str, found: str) -> StateError:
    return StateError(f"{name} is damaged or was changed by hand", found=found,
                      action="Restore the file, or choose another run folder")


def _digest(algorithm: str, data: dict) -> str:
    digest = hasher(algorithm)
    digest.update(json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    return digest.hexdigest()


def fingerprint(parts: Sequence[object]) -> str:
    """A short hex digest of JSON-able data."""
    return _digest("sha256", {"parts": list(parts)})[:32]
