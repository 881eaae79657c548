"""Train the embedded Wan-class VAE on rendered clips; its latents come out normalised like the public Wan 2.1's.

Loss: absolute and squared error and a small KL term, first on crops around the things, then on whole frames; pieces of
:data:`FRAMES` frames, which the encoder needs; what the decoder needs of longer ones comes in ``decoder.py``. Afterwards the
latent statistics are folded into the two 1x1x1 convolutions, so that ComfyUI's ``Wan21`` latent format (fixed mean and
std) fits exactly. Not covered: perceptual or adversarial losses.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..mini.render import render
from ..mini.world import random_scene
from ..vae.wan import WAN21_MEAN, WAN21_STD, WanVAE
from .common import Average, Clock, Optimiser, Processes, check_finite

DIM = 12
FRAMES = 17
CROP, CROP_FRAMES = 64, 9
CROP_SHARE = 0.65  # of the time; then whole frames, so that the per-frame attention sees the size it will be used at
DEAD = 0.25  # channels whose std is below this part of the largest are not blown up to unit variance


def clips(count: int, seed: int, device, frames: int = FRAMES, chunk: int = 64) -> Tensor:
    """``count`` rendered pieces of scenes ``[count, 3, frames, H, W]`` uint8, each from a random moment of its scene."""
    rng = random.Random(seed)
    out = []
    for first in range(0, count, chunk):
        scenes = [random_scene(rng) for _ in range(min(chunk, count - first))]
        out.append(render(scenes, frames=frames, start=rng.randrange(400), device=device).permute(0, 4, 1, 2, 3))
    return torch.cat(out)


def to_unit(video: Tensor) -> Tensor:
    """uint8 to -1..1."""
    return video.float().div_(127.5).sub_(1)


class Pool:
    """Rendered pieces on the GPU, handed out whole or as crops around the things (most of a frame is background)."""

    def __init__(self, video: Tensor, spots: int = 32):
        self.video = video
        shown = torch.stack([(v != v[:, :1, :1, :1]).any(0).any(0) for v in video])  # [N, H, W]
        self.spots = torch.multinomial(shown.flatten(1).float() + 1e-6, spots, replacement=True)

    def whole(self, size: int) -> Tensor:
        return to_unit(self.video[torch.randint(len(self.video), (size,), device=self.video.device)])

    def crops(self, size: int, side: int = CROP, frames: int = CROP_FRAMES) -> Tensor:
        """``[size, 3, frames, side, side]``, each around a pixel of a thing."""
        device, (_, _, length, height, width) = self.video.device, self.video.shape
        clip = torch.randint(len(self.video), (size,), device=device)
        spot = self.spots[clip, torch.randint(self.spots.shape[1], (size,), device=device)]
        top = (spot // width - torch.randint(side, (size,), device=device)).clamp(0, height - side)
        left = (spot % width - torch.randint(side, (size,), device=device)).clamp(0, width - side)
        first = torch.randint(length - frames + 1, (size,), device=device)
        steps = torch.arange(side, device=device)
        return to_unit(self.video[
            clip[:, None, None, None, None], torch.arange(3, device=device)[:, None, None, None],
            (first[:, None] + torch.arange(frames, device=device))[:, None, :, None, None],
            (top[:, None] + steps)[:, None, None, :, None], (left[:, None] + steps)[:, None, None, None, :]])


def quiet_start(vae: WanVAE) -> None:
    """Begin almost without latent noise: otherwise it drowns colours before the decoder has learned to use them."""
    with torch.no_grad():
        vae.conv1.weight[vae.z_dim:] *= 0.1
        vae.conv1.bias[vae.z_dim:] = -6


def loss_of(vae: WanVAE, video: Tensor, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss for ``video [B, 3, T, H, W]`` in -1..1, and its parts."""
    mean, logvar = vae.encode_parallel(video)
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    error = vae.decode_parallel(z).float() - video
    recon = error.abs().mean() + error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return recon + kl_weight * kl, {"kl": kl.detach(), "mse": error.detach().square().mean()}


@torch.no_grad()
def fold_statistics(vae: WanVAE, latents: Tensor) -> Tensor:
    """Make raw latents have the public VAE's mean and std, exactly and in place; returns each channel's std before."""
    axes = (0, 2, 3, 4)
    mean, std = latents.mean(axes), latents.std(axes)
    scale = std.clamp(min=DEAD * float(std.max()))
    public_mean, public_std = latents.new_tensor(WAN21_MEAN), latents.new_tensor(WAN21_STD)
    gain, z = public_std / scale, vae.z_dim
    vae.conv1.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = (vae.conv1.bias[:z] - mean) * gain + public_mean
    vae.conv1.bias[z:] += 2 * gain.log()
    vae.conv2.bias += vae.conv2.weight[:, :, 0, 0, 0] @ (mean - public_mean / gain)
    vae.conv2.weight /= gain.view(1, -1, 1, 1, 1)
    return std


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--batch", type=int, default=32, help="crops a step on each GPU; whole frames come four times fewer")
    parser.add_argument("--pool", type=int, default=2500, help="rendered pieces kept on each GPU")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-4)
    parser.add_argument("--adamw", action="store_true", help="AdamW for everything")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    processes = Processes()
    device = processes.device
    torch.manual_seed(1)
    vae = WanVAE(DIM, device=device)
    quiet_start(vae)
    average = Average(vae, 0.998)
    optimiser = Optimiser([vae], args.lr, muon=not args.adamw)
    torch.manual_seed(2 + processes.rank)
    pool = Pool(clips(args.pool, 1000 + processes.rank, device))
    processes.say(f"vae: {sum(p.numel() for p in vae.parameters())} weights, pool {tuple(pool.video.shape)}")
    train(vae, average, optimiser, pool, args, processes)
    if processes.first:
        finish(average.module, device, args.out)
    processes.close()


def train(vae, average, optimiser, pool: Pool, args, processes: Processes) -> None:
    """The loop: crops first, whole frames in the end."""
    clock, device = Clock(processes, args.seconds), processes.device
    while (progress := clock.tick()) < 1:
        video = pool.crops(args.batch) if progress < CROP_SHARE else pool.whole(max(args.batch // 4, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, parts = loss_of(vae, video, args.kl)
        loss.backward()
        optimiser.step(clock.factor(progress), processes)
        average.update(vae, clock.step)
        if clock.step % 200 == 1:
            check_finite(loss, clock.step)
            processes.say(f"vae {progress:4.0%} step {clock.step} loss {float(loss.detach()):.4f} "
                          f"kl {float(parts['kl']):.3f} psnr {psnr(parts['mse']):.2f}")


def psnr(mse: Tensor) -> float:
    """Decibels of a mean squared error of values in -1..1."""
    return float(10 * torch.log10(4 / mse))


def save(vae: WanVAE, path: Path) -> None:
    """Half precision under the official names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in vae.state_dict().items()}, path)


@torch.no_grad()
def finish(vae: WanVAE, device, path: Path) -> None:
    """Fold the statistics, measure on unseen clips, save in half precision under the official names."""
    video = to_unit(clips(128, 99, device))
    latents = torch.cat([vae.encode_parallel(v)[0] for v in video.split(16)])
    std = fold_statistics(vae, latents)
    vae.half().float()
    decoded = torch.cat([vae.decode_parallel(vae.encode_parallel(v)[0]) for v in video.split(16)]).clamp(-1, 1)
    mse = (decoded - video).square().mean((1, 2, 3, 4))
    print("vae channel std:", " ".join(f"{s:.2f}" for s in std.sort(descending=True).values.tolist()))
    print(f"vae unseen psnr: mean {psnr(mse.mean()):.2f} worst {psnr(mse.max()):.2f}")
    save(vae, path)


if __name__ == "__main__":
    main()
