"""Train the embedded VAE's decoder further, on pieces longer than its memory; the encoder, and so every latent, stays.

``train/vae.py`` shows 17 frames at most; what a decoder makes of frame 100 of a film it learns here. Pieces have
:data:`FRAMES` frames, so the last ones are decoded without any trace of the padding at the start. A little noise on the
latents teaches it to forgive the network's errors. Loss and names as in ``vae.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..vae.loading import load_wan_vae
from ..vae.wan import DECODER_MEMORY, WAN21_STD, WanVAE
from .common import Average, Clock, Optimiser, Processes, check_finite
from .vae import clips, psnr, save, to_unit

FRAMES = 1 + 4 * (DECODER_MEMORY + 12)
SIDE = 6  # latents: crops of 48 pixels, around the things
CROP_SHARE = 0.6  # of the time; then whole frames


@dataclass
class Pieces:
    """Rendered pieces ``video [N, 3, F, H, W]`` uint8 and their raw latents ``[N, z, T, h, w]``, on the GPU."""

    video: Tensor
    latents: Tensor

    @classmethod
    @torch.no_grad()
    def make(cls, vae: WanVAE, count: int, seed: int, device, frames: int = FRAMES) -> Pieces:
        video = clips(count, seed, device, frames, chunk=16)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            latents = [vae.encode_parallel(to_unit(v))[0] for v in video.split(4)]
        return cls(video, torch.cat(latents).float())

    def whole(self, size: int, frames: int) -> tuple[Tensor, Tensor]:
        """(latents, pixels in -1..1) of ``size`` pieces from their first frame on, ``frames`` long."""
        pick = torch.randint(len(self.video), (size,), device=self.video.device)
        return self.latents[pick, :, : (frames - 1) // 4 + 1], to_unit(self.video[pick, :, :frames])

    def crops(self, size: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
        """The same of squares of ``side`` latents around a thing, whole length."""
        pick = torch.randint(len(self.video), (size,)).tolist()
        latents, pixels = [], []
        for n in pick:
            video = self.video[n]
            frame = int(torch.randint(video.shape[1], ()))
            shown = (video[:, frame] != video[:, frame, :1, :1]).any(0).flatten().float() + 1e-6
            y, x = divmod(int(torch.multinomial(shown, 1)), video.shape[3])
            top, left = (min(max(at // 8 - int(torch.randint(side, ())), 0), most - side)
                         for at, most in zip((y, x), self.latents.shape[3:]))
            latents.append(self.latents[n, :, :, top : top + side, left : left + side])
            pixels.append(video[:, :, 8 * top : 8 * (top + side), 8 * left : 8 * (left + side)])
        return torch.stack(latents), to_unit(torch.stack(pixels))


def loss_of(vae: WanVAE, latents: Tensor, video: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of decoding latents with up to ``noise`` channel deviations of noise on them."""
    level = torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) * noise
    std = latents.new_tensor(WAN21_STD).view(1, -1, 1, 1, 1)
    error = vae.decode_parallel(latents + torch.randn_like(latents) * std * level).float() - video
    square = error.square().mean()
    return error.abs().mean() + square, square.detach()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--batch", type=int, default=6, help="crops a step on each GPU; whole frames come four times fewer")
    parser.add_argument("--pieces", type=int, default=300, help="rendered pieces on each GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.12, help="most noise on the latents, in channel deviations")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = Processes()
    device = processes.device
    vae = load_wan_vae(args.vae, device=device).requires_grad_(False)
    parts = torch.nn.ModuleList((vae.decoder, vae.conv2)).requires_grad_(True)
    average = Average(vae, 0.997)
    pieces = Pieces.make(vae, args.pieces, 5000 + processes.rank, device)
    processes.say(f"decoder: {sum(p.numel() for p in parts.parameters())} weights, pieces {tuple(pieces.video.shape)}")
    torch.manual_seed(2 + processes.rank)
    train(vae, average, Optimiser([parts], args.lr), pieces, args, processes)
    if processes.first:
        report(average.module.half().float(), device)
        save(average.module, args.out)
    processes.close()


def train(vae: WanVAE, average: Average, optimiser: Optimiser, pieces: Pieces, args, processes: Processes) -> None:
    """The loop: crops first, whole frames of a clip's and of a film's length in the end."""
    clock, device = Clock(processes, args.seconds), processes.device
    few = max(args.batch // 4, 1)
    while (progress := clock.tick()) < 1:
        if progress < CROP_SHARE:
            latents, video = pieces.crops(args.batch)
        else:
            latents, video = pieces.whole(few, FRAMES) if clock.step % 2 else pieces.whole(2 * few, 81)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, mse = loss_of(vae, latents, video, args.noise)
        loss.backward()
        optimiser.step(clock.factor(progress), processes)
        average.update(vae, clock.step)
        if clock.step % 100 == 1:
            check_finite(loss, clock.step)
            processes.say(f"decoder {progress:4.0%} step {clock.step} loss {float(loss.detach()):.4f} psnr {psnr(mse):.2f}")


@torch.no_grad()
def report(vae: WanVAE, device, count: int = 24) -> None:
    """PSNR on unseen pieces, by stretches of a film: what drifts shows here."""
    pieces = Pieces.make(vae, count, 99, device)
    video = to_unit(pieces.video)
    decoded = torch.cat([vae.decode_parallel(z) for z in pieces.latents.split(4)]).clamp(-1, 1)
    mse = (decoded - video).square().mean((1, 3, 4))  # [N, F]
    for first, last in ((0, 17), (17, 81), (81, 149), (149, FRAMES)):
        part = mse[:, first:last].mean(1)
        print(f"decoder unseen psnr, frames {first} to {last}: mean {psnr(part.mean()):.2f} worst {psnr(part.max()):.2f}")


if __name__ == "__main__":
    main()
