"""The video file of a film, which grows block by block and can be played at any time.

Every block becomes one fragment of an MP4 (H.264, made by an encoder of its own: the same pixels always give the same bytes),
kept in ``block_0007.mp4``; ``film.mp4`` is the first one's header and all fragments in a row, so appending a block
never touches what is there. A finished film is copied, without encoding again, into an ordinary seekable MP4. After a resume
the decoder's memory is built again exactly from the last latents. Needs PyAV, which ComfyUI brings. Not covered: sound.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SanaVideoError, StateError
from ..state.atomic import PART, SYSTEM, append_synced, disk_error, hasher, write_atomic
from ..vae.wan import DECODER_MEMORY, WanCache, WanVAE, denormalize
from .background import Feed, in_background
from .folder import Film
from .transfer import AHEAD, soon_on_cpu, to_cpu

TICKS = 1000  # of the video's clock in one frame, times the denominator of the frame rate
VIDEO = "film.mp4"
PRESET = "veryfast"  # on 832x480 "medium" needs four times the processor's time
THREADED = 1 << 17  # pixels of a frame from which on several threads are faster than one
INDEX = 8192, 16  # bytes for the index of a film, and for each of its frames
_MARK = b"sana-video:"


class Decoder(Protocol):
    """Latents to pixels with a memory of the past. ``memory``: latent frames from which it is exact; ``key``: names weights."""

    memory: int
    key: str

    def start(self, before: Tensor | None) -> None:
        """Forget everything, then take in the latents before the next block (None at the beginning of a video)."""

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        """Frames ``[n, H, W, 3]`` uint8, on any device, of a model-space latent ``[1, C, T, H, W]``, a few at a time."""


class WanStream:
    """The core's Wan VAE as a :class:`Decoder`."""

    memory = DECODER_MEMORY

    def __init__(self, vae: WanVAE, key: str = ""):
        self.vae, self.key, self._cache = vae, key, WanCache()

    def _raw(self, latent: Tensor) -> Tensor:
        weight = self.vae.conv2.weight
        return (denormalize(latent) if latent.shape[1] == 16 else latent).to(weight.device, weight.dtype)

    def start(self, before: Tensor | None) -> None:
        with torch.no_grad():
            self._cache = WanCache() if before is None else self.vae.rebuild_cache(self._raw(before))

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        frames = self.vae.decode_stream(self._raw(latent), self._cache)
        while True:
            with torch.no_grad():
                piece = next(frames, None)
            if piece is None:
                return
            yield _bytes(piece[0].movedim(0, -1))


def _few_ahead(coming: Iterable[Callable[[], Tensor]]) -> Iterator[Callable[[], Tensor]]:
    """The same, each as soon as all but the last :data:`AHEAD` before it have come: what is queued on a card stays short."""
    waiting: deque[Callable[[], Tensor]] = deque()
    for piece in coming:
        yield piece
        waiting.append(piece)
        if len(waiting) > AHEAD:
            waiting.popleft()()


def _bytes(frames: Tensor) -> Tensor:
    return (frames.float().clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)


def to_uint8(frames: Tensor) -> Tensor:
    """Pixels in -1..1 to uint8 on the CPU, as the official script rounds them."""
    return _bytes(frames).cpu()


def boxes(data: bytes) -> list[tuple[str, int, int]]:
    """(type, start, size) of the top-level boxes of an MP4; anything else is a ValueError."""
    found, at = [], 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("half a box")
        size, kind = struct.unpack_from(">I4s", data, at)
        if size < 8 or at + size > len(data):
            raise ValueError("a box that does not end")
        found.append((kind.decode("latin-1"), at, size))
        at += size
    return found


def x264_options(height: int, width: int, crf: int) -> dict[str, str]:
    """No B-frames, and threads by the picture's size alone: fragments stand alone, and their bytes do not depend on the
    machine's cores.

    On processors with AVX-512, x264's macroblock tree reads memory that nobody wrote (build 165, in PyAV 18.1): with other
    things in memory the same pixels become other bytes. Its AVX2 code, as fast, does not.
    """
    threads = 8 if height * width >= THREADED else 1
    level = ":asm=AVX2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ""
    return {"crf": str(crf), "preset": PRESET, "threads": str(threads),
            "x264-params": f"bframes=0:threads={threads}:keyint=250:scenecut=0{level}"}


def encode_fragment(frames: Iterable[Tensor], start: int, number: int, fps: Fraction, crf: int = 17) -> tuple[bytes, bytes, int]:
    """(header, fragment, frames) of groups of frames ``[n, H, W, 3]`` uint8 that begin at frame ``start`` of the film."""
    import av
    from av.video.reformatter import Colorspace

    file, count, stream = io.BytesIO(), 0, None
    options = {"movflags": "frag_custom+empty_moov+default_base_moof", "fragment_index": str(number + 1),
               "video_track_timescale": str(fps.numerator * TICKS), "fflags": "+bitexact"}
    with av.open(file, "w", format="mp4", options=options) as container:
        for group in frames:
            for image in group:
                if stream is None:
                    stream = container.add_stream("libx264", rate=fps, options=x264_options(*image.shape[:2], crf))
                    stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
                    context = stream.codec_context
                    context.time_base = 1 / fps
                    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
                    context.color_range = 1
                frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
                frame.pts, frame.time_base = count, 1 / fps
                container.mux(stream.encode(frame))
                count += 1
        if stream is None:
            raise SanaVideoError("A block without frames cannot become video")
        container.mux(stream.encode())
    data = bytearray(file.getvalue())
    place = data.index(b"tfdt") + 4
    if data[place] != 1:
        raise SanaVideoError("This build of PyAV writes fragments of an unknown form", found=f"tfdt version {data[place]}")
    struct.pack_into(">Q", data, place + 4, start * fps.denominator * TICKS)
    parts = {kind: bytes(data[at:at + size]) for kind, at, size in boxes(bytes(data))}
    return parts["ftyp"] + parts["moov"], parts["moof"] + parts["mdat"], count


class FilmVideo:
    """The growing video of one film. Decodes finished blocks in order; anything it wrote before is used again.

    ``overlap``: a thread waits for what the decoder makes, and encodes it, while the card is given more to do. For a decoder on
    a card; on a CPU the two would wait for each other.
    """

    def __init__(self, film: Film, decoder: Decoder, fps: float | Fraction = 16, crf: int = 17, name: str = VIDEO,
                 overlap: bool = False):
        self.film, self.decoder, self.crf, self.overlap = film, decoder, crf, overlap
        self.fps = Fraction(fps).limit_denominator(1001)
        self.path = film.folder / name
        self.blocks = 0  # blocks in the file
        self.frames = 0  # pixel frames in the file
        self._ready: int | None = None  # the block that the decoder can take next
        self._header = b""
        self._size = 0
        self._pending: Future | None = None

    def contract(self, block: int) -> str:
        """What the fragment of a block depends on."""
        digest = hasher(self.film.plan.algorithm)
        digest.update(json.dumps([self.film.plan.contracts[block], self.decoder.key, str(self.fps), self.crf, PRESET]).encode())
        return digest.hexdigest()

    def open(self) -> int:
        """Bring the file to the state of the fragments on disk; returns how many blocks it shows."""
        finished, segments = self.film.finished(), []
        while len(segments) < finished and (found := self._segment(len(segments))) is not None:
            segments.append(found)
        self.blocks, self.frames = len(segments), sum(s[2] for s in segments)
        self._size = sum(s[1][1] for s in segments) + (len(segments[0][0]) if segments else 0)
        self._header = segments[0][0] if segments else b""
        if segments and not self._complete():
            write_atomic(self.path, self._pieces(segments))
        return self.blocks

    def _pieces(self, segments: list) -> Iterator[bytes]:
        yield self._header
        for block, (_, (start, size), _) in enumerate(segments):
            with open(self.film.segment_path(block), "rb") as file:
                file.seek(start)
                yield file.read(size)

    def _segment(self, block: int) -> tuple[bytes, tuple[int, int], int] | None:
        """(header, (start, size) of the fragment, frames) of a block's fragment file; None unless it is whole and current."""
        try:
            data = self.film.segment_path(block).read_bytes()
            kind, at, size = boxes(data)[-1]
            mark = data[at + 8:at + size]
            if kind != "free" or not mark.startswith(_MARK):
                return None
            record = json.loads(mark[len(_MARK):])
            digest = hasher(self.film.plan.algorithm)
            digest.update(data[:at])
            if record["contract"] != self.contract(block) or record["digest"] != digest.hexdigest():
                return None
            moof = next(start for kind, start, _ in boxes(data) if kind == "moof")
            return data[:moof], (moof, at - moof), int(record["frames"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration):
            return None  # made anew from the latent

    def begin(self, block: int, latent: Tensor | None = None, store: Callable[[], Future] | None = None) -> None:
        """Decode a block; its frames are encoded and appended to the file at the latest when :meth:`finish` returns.

        ``latent``: the block's, where it is not on disk yet; what ``store()`` returns ends when it is, and before that nothing is
        appended. Threads begin when a card has work, because it waits while they start.
        """
        self.finish()
        if block != self.blocks:
            raise SanaVideoError("Blocks are decoded in order", found=f"block {block + 1}", expected=f"block {self.blocks + 1}")
        found = self._segment(block)
        if found is not None:
            self._ready = None
            self._attach(block, *found)
            return
        if self._ready != block:
            self.decoder.start(self.film.latents_before(block, self.decoder.memory))
        self._ready = None  # until it has gone well
        latent = self.film.latent(block) if latent is None else latent
        if not self.overlap:
            self._encode(block, to_cpu(self.decoder.decode(latent)), None if store is None else store())
            self._ready = block + 1
            return
        pieces, feed = _few_ahead(soon_on_cpu(frames) for frames in self.decoder.decode(latent)), Feed()
        try:
            first = next(pieces, None)
            stored = None if store is None else store()
            self._pending = in_background(self._encode, block, (frames() for frames in feed), stored)
            for frames in itertools.chain(() if first is None else (first,), pieces):
                feed.put(frames)
            feed.end()
            self._ready = block + 1
        finally:
            if self._ready is None:
                feed.break_off()
                self.settle()

    def finish(self) -> None:
        """Wait until what :meth:`begin` began is in the file, and raise what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """As :meth:`finish`, where something else has gone wrong already: a block that is not in the file is made anew later."""
        with contextlib.suppress(Exception):
            self.finish()

    def _attach(self, block: int, header: bytes, place: tuple[int, int], frames: int) -> None:
        """Append a block's fragment, which is on disk, to the file."""
        start, size = place
        with open(self.film.segment_path(block), "rb") as file:
            file.seek(start)
            fragment = file.read(size)
        if block == 0:
            write_atomic(self.path, [header, fragment])
            self._header, self._size = header, len(header)
        elif header != self._header:
            raise SanaVideoError("The fragments of the film do not belong together",
                                 action="Remove the block_*.mp4 files; they are made again from the latents")
        else:
            self._append(fragment)
        self.blocks, self.frames, self._size = block + 1, self.frames + frames, self._size + size

    def _append(self, fragment: bytes) -> None:
        try:
            if self.path.stat().st_size != self._size:  # a finished film that goes on, or a file that someone has changed
                write_atomic(self.path, self._pieces([self._segment(i) for i in range(self.blocks)]))
            append_synced(self.path, fragment)
        except StateError:
            if self.path.exists():
                with open(self.path, "r+b") as file:
                    file.truncate(self._size)
            raise
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _encode(self, block: int, frames: Iterable[Tensor], stored: Future | None) -> None:
        """Frames to a fragment on disk and in the file."""
        header, fragment, count = encode_fragment(frames, self.frames, block, self.fps, self.crf)
        if stored is not None:
            stored.result()
        digest = hasher(self.film.plan.algorithm)
        digest.update(header + fragment)
        record = {"contract": self.contract(block), "digest": digest.hexdigest(), "frames": count, "start": self.frames}
        mark = _MARK + json.dumps(record, sort_keys=True).encode()
        write_atomic(self.film.segment_path(block), [header, fragment, struct.pack(">I4s", len(mark) + 8, b"free"), mark])
        self._attach(block, header, (len(header), len(fragment)), count)

    def catch_up(self) -> int:
        """Decode every finished block that the file does not show yet, and complete the file when the film is complete."""
        self.finish()
        finished = self.film.finished()
        for block in range(self.blocks, finished):
            self.begin(block)
        self.finish()
        if self.blocks == len(self.film.plan.blocks):
            self.complete()
        return self.blocks

    def _end(self) -> bytes:
        mark = _MARK + f"complete {self.contract(self.blocks - 1)}".encode()
        return struct.pack(">I4s", len(mark) + 8, b"free") + mark

    def _complete(self) -> bool:
        end = self._end()
        if not self.path.exists() or self.blocks < len(self.film.plan.blocks) or self.path.stat().st_size < len(end):
            return False
        with open(self.path, "rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end

    def complete(self) -> None:
        """Turn the file of a complete film into an ordinary MP4 that players can seek in; no picture is encoded again."""
        import av

        if self.blocks and not self._complete():
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
            try:
                _remux(self.path, part, self.frames)
                append_synced(part, self._end())
                SYSTEM.replace(part, self.path)
                SYSTEM.sync_folder(self.path.parent)
            except (OSError, av.FFmpegError) as error:
                raise disk_error(error if isinstance(error, OSError) else OSError(str(error)), self.path) from error
            finally:
                if part.exists():
                    part.unlink()


def _remux(source: Path, target: Path, frames: int) -> None:
    """The packets of ``source`` as an ordinary MP4; the index comes first, in room left for it, so that all is written once."""
    import av

    options = {"moov_size": str(INDEX[0] + INDEX[1] * frames), "fflags": "+bitexact"}
    with av.open(str(source)) as old, av.open(str(target), "w", format="mp4", options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
