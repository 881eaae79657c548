"""Train the embedded clip model: Gemma-2-class text encoder and Linear DiT together, flow matching on VAE latents.

Objective (model spec 4): x_t = (1 - s) x0 + s n, the network sees the whole number in 1000 s and predicts n - x0; s is a
logit-normal draw, shifted; 10 % of the captions are dropped for guidance. Not covered: causal training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import load_transformer, save_transformer
from ..dit.model import SanaVideoTransformer, init_weights
from ..mini.tokenizer import train_tokenizer
from ..sampling.schedules import shifted
from ..specs import get_spec
from ..text.encode import TOKENIZER_KEY, Tokenizer, load_text_encoder
from ..text.gemma import MINI_CONFIG, Gemma2
from ..vae.loading import load_wan_vae
from .common import Average, Clock, Graphed, Optimiser, Processes, Record
from .data import make_clips
from .fast import training_operators


class Pair(nn.Module):
    """Text encoder and network as one module: token ids in, velocity out."""

    def __init__(self, spec_name: str = "sana-video-mini", device=None):
        super().__init__()
        self.text = Gemma2(MINI_CONFIG, device=device)
        self.network = SanaVideoTransformer(get_spec(spec_name), device=device)

    def forward(self, latent: Tensor, times: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.network(latent, times, self.text(ids, mask), mask)


def init_pair(pair: Pair, seed: int) -> None:
    """Initial weights of both halves. Captions enter at unit size: there is no pretrained encoder to hold back."""
    torch.manual_seed(seed)
    init_weights(pair.network)
    nn.init.ones_(pair.network.attention_y_norm.weight)
    for p in pair.text.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)


def flow_loss(pair: nn.Module, latent: Tensor, ids: Tensor, mask: Tensor, shifts: Tensor) -> Tensor:
    """Mean squared error of the velocity at random times; each clip's draw is shifted by one of ``shifts [n]``."""
    u = torch.sigmoid(torch.randn(len(latent), device=latent.device))
    sigma = shifted(u, shifts[torch.randint(len(shifts), u.shape, device=u.device)])
    noise = torch.randn_like(latent)
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(latent.device.type, torch.bfloat16, enabled=latent.is_cuda):
        v = pair((1 - level) * latent + level * noise, 1000 * sigma, ids, mask)
    return F.mse_loss(v.float(), noise - latent)


def save_pair(pair: Pair, folder: Path, tokenizer: bytes, name: str = "mini_transformer") -> None:
    """The two files of the embedded model, half precision storage: transformer in official naming, text for ComfyUI."""
    folder.mkdir(parents=True, exist_ok=True)
    save_transformer(pair.network, pair.network.spec, folder / f"{name}.safetensors", dtype=torch.float16)
    state = {k: v.half().cpu().contiguous() for k, v in pair.text.state_dict().items()}
    state[TOKENIZER_KEY] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8).clone()
    save_file(state, folder / "mini_text.safetensors",
              metadata={"config": MINI_CONFIG.to_json(), "uses_instruction": "false"})


def restore(pair: Pair, average: Average, folder: Path | None, device) -> None:
    """Continue from the two weight files in ``folder``, when one is named."""
    if folder is not None:
        network = load_transformer(folder / "mini_transformer.safetensors", dtype=torch.float32, device=device)
        pair.network.load_state_dict(network.state_dict())
        pair.text.load_state_dict(load_text_encoder(folder / "mini_text.safetensors", device=device).network.state_dict())
        average.module.load_state_dict(pair.state_dict())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420, help="training time without making the clips")
    parser.add_argument("--clips", type=int, default=12000, help="clips on each GPU")
    parser.add_argument("--batch", type=int, default=64, help="clips a step on each GPU")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--shifts", type=float, nargs="+", default=[3.0, 10.0],
                        help="shifts of the noise times; where a thing is and what it does is settled near pure noise")
    parser.add_argument("--adamw", action="store_true", help="AdamW for everything")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder with the two weight files to go on from")
    parser.add_argument("--seed", type=int, default=7, help="of the clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two weight files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = Processes()
    device = processes.device
    tokenizer = train_tokenizer()
    vae = load_wan_vae(args.vae, device=device)
    data = make_clips(vae, Tokenizer(tokenizer), args.clips, args.seed + processes.rank, device)
    pair = Pair(device=device)
    init_pair(pair, 3)
    average = Average(pair, 0.9995)
    restore(pair, average, args.resume, device)
    processes.say(f"clip: {sum(p.numel() for p in pair.parameters())} weights, latents {tuple(data.latents.shape)} "
                  f"std {float(data.latents[:256].float().std()):.3f}")
    optimiser = Optimiser([pair], args.lr, muon=not args.adamw, keep_grads=True)
    if not args.no_compile:
        for block in pair.network.blocks:
            block.compile()
    torch.manual_seed(100 + processes.rank)
    with training_operators():
        history = train(pair, average, optimiser, data, args, processes)
    if processes.first:
        save_pair(average.module, args.out, tokenizer)
        (args.out / "clip_history.json").write_text(json.dumps(history))
    processes.close()


def train(pair, average, optimiser, data, args, processes) -> list[tuple[int, float, float]]:
    """The loop; returns (step, progress, smoothed loss) rows."""
    shifts = torch.tensor(args.shifts, device=processes.device)
    loss_and_gradients = Graphed(lambda latent, ids, mask: flow_loss(pair, latent, ids, mask, shifts),
                                 data.batch(args.batch, 0.1), optimiser.parameters)
    clock = Clock(processes, args.seconds)
    record = Record("clip", processes, clock, 100)
    while (progress := clock.tick()) < 1:
        loss = loss_and_gradients(*data.batch(args.batch, 0.1))
        optimiser.step(clock.factor(progress), processes)
        average.update(pair, clock.step)
        record.add(loss, progress)
    return record.finish()


if __name__ == "__main__":
    main()
