"""Run folders inside ComfyUI: where they lie, ComfyUI's Wan VAE as a film's decoder, the VIDEO of a film.

A run folder is a name below ``output/sana_video``; nothing outside ComfyUI's output folder is ever read or written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..sana_video_core.errors import SanaVideoError
from .common import bring, vae_geometry
from .fused_vae import fused_cache, fused_frames
from .long import weights_print

FOLDER = "sana_video"
KEPT = "Every finished block is on disk: decode later with 'SANA-Video Decode'"
_NAME = re.compile(r"[^\x00-\x1f<>:\"|?*\\/%]{1,100}")
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
MAX_DEPTH = 4


def safe_path(name: object, below: str | Path, what: str) -> Path:
    """The path of ``name`` (folders split by /) below ``below``; anything that could lead elsewhere is refused."""
    parts = str(name).strip().split("/") if isinstance(name, str) else []
    bad = not parts or len(parts) > MAX_DEPTH or any(
        not _NAME.fullmatch(p) or p.strip(" .") != p or _DEVICE.fullmatch(p) for p in parts)
    root = Path(os.path.realpath(below))
    path = root.joinpath(*parts) if not bad else root
    if bad or not Path(os.path.realpath(path)).is_relative_to(root):
        raise SanaVideoError(f"This is no name for a {what}", found=repr(name)[:80],
                             expected="a name such as my_film, or folder/my_film",
                             action="Use letters, digits, spaces, dashes and underscores")
    return path


def films_root() -> Path:
    """The folder of all run folders."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / FOLDER


def run_folder(name: object, must_exist: bool = False) -> Path:
    """The path of the run folder ``name``."""
    path = safe_path(name, films_root(), "run folder")
    if must_exist and not (path / "film.json").exists():
        known = sorted(p.parent.name for p in films_root().glob("*/film.json"))[:8]
        raise SanaVideoError("There is no such run folder", found=str(name), expected=", ".join(known) or "none made yet",
                             action="Use the name that 'SANA-Video Block Sampler' wrote to")
    return path


def film_stamp(name: object) -> list:
    """Names, sizes and times of the files of a film; empty without one."""
    if not isinstance(name, str) or not name.strip():
        return []
    try:
        folder = run_folder(name.strip(), must_exist=True)
    except SanaVideoError:
        return ["none"]
    files = [*folder.glob("block_*.safetensors"), folder / "film.json"]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]


class NativeStream:
    """ComfyUI's Wan VAE as the core's :class:`~sana_video_core.film.Decoder`.

    The fused decoder runs where it can. ComfyUI's own must get one latent frame first and two or more in
    every later call (vae/text spec 1.7): a single frame at the end of a block is decoded together with a copy of itself, and
    once more, dropped, in front of the next block.
    """

    memory = 39  # one more than the decoder remembers, so that the frames that count are decoded in pairs, as without a resume

    def __init__(self, vae):
        import comfy.ldm.wan.vae

        if not isinstance(getattr(vae, "first_stage_model", None), comfy.ldm.wan.vae.WanVAE):
            raise SanaVideoError("Films are decoded with the Wan 2.1 VAE", found=f"{vae_geometry(vae)}",
                                 action="Choose wan_2.1_vae.safetensors (models/vae)")
        self.vae = vae
        self._fused, backend = fused_cache(vae)
        self.key = f"comfyui wan {weights_print(vae.first_stage_model.state_dict().items())} {vae.vae_dtype}" \
            + (f" {backend}" if backend else "")
        self._cache: list | None = None
        self._held = None

    def start(self, before) -> None:
        """See the protocol."""
        from comfy.ldm.wan.vae import count_cache_layers

        if self._fused is not None:
            self._fused = type(self._fused)()
        self._cache, self._held = [None] * count_cache_layers(self.vae.first_stage_model.decoder), None
        if before is not None:
            for _ in self.decode(before):
                pass

    def decode(self, latent) -> Iterator:
        """See the protocol."""
        if self._fused is not None:
            return (self._bytes(p) for p in fused_frames(self.vae, self._raw(latent), self._fused, KEPT))
        return self._decode_natively(latent)

    def _bytes(self, pixels):
        import torch

        return (self.vae.process_output(pixels.float())[0].movedim(0, -1) * 255).to(torch.uint8)

    def _decode_natively(self, latent) -> Iterator:
        import comfy.model_management as management
        import torch

        self._load(latent)
        z = self._raw(latent)
        begins = self._cache[0] is None and self._held is None
        skip = 0
        if self._held is not None:
            z, skip = torch.cat((self._held, z), 2), 4
            self._held = None
        sizes = ([1] if begins else []) + _groups(z.shape[2] - (1 if begins else 0))
        start = 0
        for size in sizes:
            management.throw_exception_if_processing_interrupted()
            group = z[:, :, start:start + size]
            start += size
            if size == 1 and not (begins and start == 1):
                kept, self._cache = self._cache, list(self._cache)
                frames = self._decode(torch.cat((group, group), 2))[:4]
                self._cache, self._held = kept, group
            else:
                frames = self._decode(group)
            yield frames[skip:]
            skip = 0

    def _raw(self, latent):
        from ..sana_video_core.vae.wan import denormalize

        return denormalize(latent.float()).to(self.vae.device, self.vae.vae_dtype)  # core's waits for the card

    def _load(self, latent) -> None:
        shape = (1, latent.shape[1], min(latent.shape[2], 3), *latent.shape[3:])
        bring(self.vae.patcher, self.vae.memory_used_decode(shape, self.vae.vae_dtype))

    def _decode(self, z):
        import comfy.model_management as management
        import torch

        network = self.vae.first_stage_model
        try:
            with management.cuda_device_context(self.vae.device):
                pieces = network.decoder(network.conv2(z), feat_cache=self._cache, feat_idx=[0])
        except Exception as error:
            management.raise_non_oom(error)
            raise SanaVideoError("Not enough memory to decode the film exactly", found=f"{z.shape[4]}x{z.shape[3]} latents",
                                 action=KEPT) from error
        return torch.cat([self._bytes(p) for p in pieces]).cpu()


def film_file(film, vae, fps: float):
    """The core's FilmVideo of ``film`` with ComfyUI's Wan VAE; on a card frames are encoded while it goes on."""
    from ..sana_video_core.film import FilmVideo

    return FilmVideo(film, NativeStream(vae), fps, overlap=vae.device.type != "cpu")


def _groups(frames: int) -> list[int]:
    """Pairs; an odd frame joins the last pair, a lone frame stays alone."""
    if frames <= 0:
        return []
    sizes = [2] * (frames // 2)
    if frames % 2:
        sizes = [*sizes[:-1], 3] if sizes else [1]
    return sizes


def film_video(path: Path):
    """ComfyUI's VIDEO of a film's file: saving it copies the stream, nothing is held in memory."""
    from comfy_api.latest import InputImpl

    return InputImpl.VideoFromFile(str(path))
