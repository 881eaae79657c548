"""Looks at a finished video: is it a whole H.264 clip, and does it show what the prompt says? Runs where torch is."""

from __future__ import annotations

from pathlib import Path

SHORTEST = 80  # frames; the workflow asks for 81


def main(video: Path, prompt: str) -> int:
    """Prints a line about the file and the judge's line; 0 when both are as they should be."""
    from sana_video_core.errors import SanaVideoError
    from sana_video_core.mini.judge import judge

    frames, codec, rate = read(video)
    count, height, width = frames.shape[:3]
    print(f"file: {codec}, {count} frames of {width}x{height}, {rate:g} a second, {video.stat().st_size / 1000:.0f} kB")
    if codec != "h264" or count < SHORTEST:
        print(f"file: expected h264 and at least {SHORTEST} frames")
        return 1
    try:
        verdict = judge(frames, prompt)
    except SanaVideoError as error:
        print(f"judge: {error}")
        return 1
    seen = ", ".join(" ".join(part or "?" for part in (r.colour, r.shape, r.motion)) for r in verdict.readings) or "nothing"
    reasons = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
    print(f"judge: {'agrees with the prompt' if verdict.ok else 'does not agree with the prompt'}; it saw: {seen}{reasons}")
    return 0 if verdict.ok else 1


def read(video: Path):
    """(frames uint8 ``[F, H, W, 3]``, codec name, frames a second)."""
    import av
    import numpy as np
    import torch

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return torch.from_numpy(frames), stream.codec_context.name, float(stream.average_rate)
