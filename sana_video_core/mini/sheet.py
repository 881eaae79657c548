"""Contact sheets and storyboards: some frames of each clip side by side, its sentence below. Needs Pillow (stock in ComfyUI)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SanaVideoError

PAPER, INK, BAD = (250, 250, 248), (32, 32, 32), (176, 24, 24)


def contact_sheet(clips: Sequence[Tensor], captions: Sequence[str], path: str | Path, *, frames: int = 6, scale: int = 1,
                  columns: int = 2, marks: Sequence[bool] | None = None) -> Path:
    """Write one picture of all clips (uint8 ``[F, H, W, 3]``): ``frames`` of each in a row (see ``strip``).

    ``scale`` enlarges each frame, ``columns`` rows of frames stand beside each other, ``marks`` False prints a caption in
    red. The file's ending decides the format (.png, .jpg). Returns the path.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not clips or len(clips) != len(captions):
        raise SanaVideoError("A contact sheet needs one caption a clip", found=f"{len(clips)} clips, {len(captions)} captions")
    strips = [strip(clip, frames, scale) for clip in clips]
    high, wide = strips[0].shape[:2]
    size, gap = 7 + 5 * scale, 6 + 4 * scale
    font = ImageFont.load_default(size)
    columns = min(columns, len(strips))
    row_high = high + size + 2 * gap
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * (wide + gap) + gap, rows * row_high + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(strips, captions)):
        left, top = gap + i % columns * (wide + gap), gap + i // columns * row_high
        sheet.paste(Image.fromarray(picture.numpy()), (left, top))
        ink = INK if marks is None or marks[i] else BAD
        draw.text((left, top + high + gap // 2), _shorten(text, wide, font), fill=ink, font=font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, **({"quality": 90} if path.suffix.lower() in (".jpg", ".jpeg") else {"optimize": True}))
    return path


def strip(clip: Tensor, frames: int = 6, scale: int = 1, gap: int = 2) -> Tensor:
    """``frames`` frames of a uint8 clip ``[F, H, W, 3]`` side by side, enlarged: uint8 ``[H, W, 3]``.

    Every eighth frame (half a second) where the clip is long enough: the motions have periods of 32 and 40 frames.
    """
    every = min(8, (len(clip) - 1) / max(frames - 1, 1))
    index = (torch.arange(frames) * every).round().long()
    picked = clip.cpu()[index].permute(0, 3, 1, 2)
    if scale != 1:
        picked = F.interpolate(picked.float(), scale_factor=scale, mode="bicubic").clamp(0, 255).round().to(torch.uint8)
    picked = F.pad(picked.permute(0, 2, 3, 1), (0, 0, 0, gap * scale), value=PAPER[0])
    return torch.cat(list(picked), 1)[:, : -gap * scale].contiguous()


def _shorten(text: str, wide: int, font) -> str:
    """The text, cut at the end so that it is no wider than ``wide`` px."""
    if font.getlength(text) <= wide:
        return text
    while text and font.getlength(text + " ...") > wide:
        text = text[:-1]
    return text + " ..."
