"""Which frames a block holds: latent and pixel arithmetic of a film (causal spec 4.1).

Blocks and frames are counted from 0 here, from 1 where a person reads them. A film's latent frame 0 holds one pixel frame,
every later one ``stride`` (4 with the Wan VAE). Not covered: what is in the blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import SanaVideoError

MAX_BLOCKS = 10_000  # about seven hours at 16 frames a second
MAX_BLOCK_FRAMES = 256


class Span(NamedTuple):
    """One block: absolute ``index``, absolute first latent frame ``start``, number of latent ``frames``."""

    index: int
    start: int
    frames: int

    @property
    def end(self) -> int:
        return self.start + self.frames

    def pixels(self, stride: int = 4) -> tuple[int, int]:
        """First pixel frame and the one after the last."""
        return pixel_frames(self.start, stride), pixel_frames(self.end, stride)


class BlockPlan(NamedTuple):
    """Consecutive blocks of ``lengths`` latent frames; the first is block ``index`` and begins at latent frame ``start``."""

    lengths: tuple[int, ...]
    index: int = 0
    start: int = 0

    def spans(self) -> list[Span]:
        out, start = [], self.start
        for i, frames in enumerate(self.lengths):
            out.append(Span(self.index + i, start, frames))
            start += frames
        return out

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    def checked(self) -> BlockPlan:
        """The plan itself; refused when it has no blocks, too many, or blocks of impossible length."""
        if not 1 <= len(self.lengths) <= MAX_BLOCKS:
            raise SanaVideoError("The number of blocks cannot be sampled", found=len(self.lengths),
                                 expected=f"1 to {MAX_BLOCKS}", action=f"Use {min(max(len(self.lengths), 1), MAX_BLOCKS)}")
        for i, n in enumerate(self.lengths):
            if type(n) is not int or not 1 <= n <= MAX_BLOCK_FRAMES:
                raise SanaVideoError(f"Block {self.index + i + 1} has an impossible length", found=f"{n} latent frames",
                                     expected=f"1 to {MAX_BLOCK_FRAMES}")
        return self


def pixel_frames(latent_frames: int, stride: int = 4) -> int:
    """Pixel frames of the first ``latent_frames`` latent frames of a film."""
    return 0 if latent_frames <= 0 else 1 + (latent_frames - 1) * stride


def split(total: int, base: int = 10) -> tuple[int, ...]:
    """The official partition of ``total`` latent frames: blocks of ``base``, the first takes the remainder too."""
    if total < 1 or base < 1:
        raise SanaVideoError("A film needs at least one latent frame", found=f"{total} frames in blocks of {base}")
    whole, rest = divmod(total, base)
    return (total,) if whole == 0 else (base + rest,) + (base,) * (whole - 1)


def plan_blocks(blocks: int, base: int = 10, first: int = 0, index: int = 0, start: int = 0) -> BlockPlan:
    """``blocks`` blocks of ``base`` latent frames. A film's own first block has ``first`` frames (0: one more than ``base``,
    as in training, because its first latent frame holds a single pixel frame)."""
    if type(blocks) is not int or not 1 <= blocks <= MAX_BLOCKS:
        nearest = min(max(blocks, 1), MAX_BLOCKS) if type(blocks) is int else 1
        raise SanaVideoError("The number of blocks cannot be sampled", found=blocks, expected=f"1 to {MAX_BLOCKS}",
                             action=f"Use {nearest}")
    lengths = [base] * blocks
    if start == 0:
        lengths[0] = first or base + 1
    return BlockPlan(tuple(lengths), index, start).checked()


def seconds_of(span: Span, fps: float, stride: int = 4) -> tuple[float, float]:
    """Start and end of a block in seconds."""
    first, end = span.pixels(stride)
    return first / fps, end / fps
