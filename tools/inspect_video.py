"""Looks at a finished video: is it a whole H.264 file, and does it show what the prompt says? Runs where torch is.

A film is judged in windows, one after the other, so that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

WINDOW = 80  # frames; a rest too short to be judged alone belongs to the window before
ENOUGH = 0.9  # share of the windows that must agree


def main(video: Path, prompt: str, expected: int) -> int:
    """Prints a line about the file (``expected`` frames at least) and the judge's; 0 when both are as they should be."""
    import av

    from sana_video_core.errors import SanaVideoError
    from sana_video_core.mini.captions import parse
    from sana_video_core.mini.judge import SHORTEST, judge

    seconds, verdicts = [0.0], []
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        codec, rate = stream.codec_context.name, float(stream.average_rate)
        try:
            wanted = parse(prompt)
            for window in windows(pictures(container), WINDOW, SHORTEST):
                verdicts.append(judge(window, wanted))
                seconds.append(seconds[-1] + len(window) / rate)
        except SanaVideoError as error:
            print(f"judge: {error}")
            return 1
        frames = round(seconds[-1] * rate)
        print(f"file: {codec}, {frames} frames of {stream.width}x{stream.height}, {rate:g} a second, "
              f"{video.stat().st_size / 1000:.0f} kB")
    if codec != "h264" or frames < expected:
        print(f"file: expected h264 and at least {expected} frames")
        return 1
    return report(verdicts, seconds)


def report(verdicts: list, seconds: list[float]) -> int:
    """The judge's line, and one for each window of a film that does not agree; 0 when enough of them do. ``seconds`` are the
    borders of the windows."""
    right = sum(v.ok for v in verdicts)
    good = right >= ENOUGH * len(verdicts)
    where = f" in {right} of {len(verdicts)} windows" if len(verdicts) > 1 else ""
    first = verdicts[0]
    said = f"judge: {'agrees' if good else 'does not agree'} with the prompt{where}; it saw: {seen(first)}"
    print(said + (f" ({'; '.join(first.reasons)})" if first.reasons else ""))
    if len(verdicts) > 1:
        for verdict, start, end in zip(verdicts, seconds, seconds[1:]):
            if not verdict.ok:
                print(f"  {start:.0f}-{end:.0f} s: {seen(verdict)} ({'; '.join(verdict.reasons)})")
    return 0 if good else 1


def seen(verdict) -> str:
    """What the judge saw, in words."""
    return ", ".join(" ".join(part or "?" for part in (r.colour, r.shape, r.motion)) for r in verdict.readings) or "nothing"


def pictures(container) -> Iterator:
    """uint8 ``[H, W, 3]`` of each frame of an open video."""
    import torch

    for frame in container.decode(video=0):
        yield torch.from_numpy(frame.to_ndarray(format="rgb24"))


def windows(frames: Iterable, length: int, least: int) -> Iterator:
    """``[length, ...]`` of every ``length`` frames; a rest of fewer than ``least`` is added to the last window."""
    import torch

    held, fresh = None, []
    for frame in frames:
        fresh.append(frame)
        if len(fresh) == length:
            if held is not None:
                yield held
            held, fresh = torch.stack(fresh), []
    if held is not None and 0 < len(fresh) < least:
        held, fresh = torch.cat((held, torch.stack(fresh))), []
    if held is not None:
        yield held
    if fresh:
        yield torch.stack(fresh)
