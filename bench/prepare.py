"""Full-size random model files under a ComfyUI base folder: the network in three layouts, the Wan VAE, Gemma-2-2B.

``run.py bench prepare BASE [--tiny]``. Values come from a seed on the device at hand, so another process makes the same.
The .pth holds float32, the others its rounding to bfloat16 (as the public files do).
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.specs import ModelSpec
from sana_video_core.text.gemma import GemmaConfig
from sana_video_core.vae.wan import WanVAE

from . import dit, weights
from .cli import ROOT

SEED = 11
VOCABULARY = 1200  # pieces of the tokenizer
WORKFLOWS = [ROOT / "workflows" / f"{name}.json" for name in ("t2v_480p", "long_video_minute")]
PTH, SAFETENSORS, DIFFUSERS = "SANA_Video_2B_480p.pth", "sana_video_2b_480p_bf16.safetensors", "sana_video_2b_480p_diffusers"
TEXT, VAE = "gemma_2_2b_it_elm_bf16.safetensors", "wan_2.1_vae.safetensors"
# Of the random decoder's pictures: at full contrast they are white noise, which no film comes near and which would time the
# video encoder alone. At this one its stream has about 7 Mbit/s at 832x480 (160x160 measured), as a detailed film may have.
CONTRAST = 0.1
WORDS = "motion score user prompt given generate an enhanced detailed visual description 0 1 2 3 4 5 6 7 8 9 . , : \" -"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def layouts(base: Path) -> dict[str, Path]:
    """{layout: what ComfyUI's list of diffusion models shows}."""
    folder = base / "models" / "diffusion_models"
    return {"official .pth float32": folder / PTH, "safetensors bf16": folder / SAFETENSORS,
            "diffusers folder bf16": folder / DIFFUSERS}


def network(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The float32 state of the random network, on the device."""
    with torch.device(device()):
        model = SanaVideoTransformer(spec, dtype=torch.float32)
    return weights.fill(model, SEED).state_dict()


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """bf16 values of order one through any depth: N(0, 1 / fan in); norm gains near their neutral value."""
    generator = torch.Generator(device()).manual_seed(SEED)
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device())
        if name.endswith("gamma"):
            value = 1 + 0.1 * noise
        elif len(shape) < 2:
            value = 0.05 * noise
        elif "embed_tokens" in name:
            value = noise * shape[1] ** -0.5
        else:
            value = noise * math.prod(shape[1:]) ** -0.5
        out[name] = value.to(torch.bfloat16).cpu()
    return out


def vae_state(tiny: bool) -> dict[str, torch.Tensor]:
    """bf16 values of a random Wan VAE under the official names, of full width (96) or of width 8."""
    with torch.device("meta"):
        vae = WanVAE(dim=8 if tiny else 96)
    state = random_state({name: tuple(t.shape) for name, t in vae.state_dict().items()})
    state["decoder.head.2.weight"] *= CONTRAST
    return state


def words() -> list[str]:
    """The words of the timed workflows' prompts: a tokenizer that spelt them letter by letter would find them too long."""
    nodes = [node for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]]
    texts = [value for node in nodes for value in node.get("widgets_values") or () if isinstance(value, str) and " " in value]
    return " ".join([WORDS, *texts]).split()


def tokenizer() -> bytes:
    """A SentencePiece model of a few words with Gemma's special ids."""
    import sentencepiece

    lines, model = words(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=VOCABULARY, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        model_type="bpe", character_coverage=1.0, minloglevel=2, hard_vocab_limit=False)
    return model.getvalue()


def gemma_state(config: GemmaConfig) -> dict[str, torch.Tensor]:
    """Random weights under the public names."""
    c, wide, narrow = config, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size), "model.norm.weight": (c.hidden_size,)}
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}{n}_layernorm.weight": (c.hidden_size,) for n in (
            "input", "post_attention", "pre_feedforward", "post_feedforward")}
        shapes |= {f"{p}self_attn.q_proj.weight": (wide, c.hidden_size), f"{p}self_attn.k_proj.weight": (narrow, c.hidden_size),
                   f"{p}self_attn.v_proj.weight": (narrow, c.hidden_size), f"{p}self_attn.o_proj.weight": (c.hidden_size, wide),
                   f"{p}mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
                   f"{p}mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
                   f"{p}mlp.down_proj.weight": (c.hidden_size, c.intermediate_size)}
    return random_state(shapes)


def write_all(base: Path, tiny: bool, wanted: Collection[str] | None = None) -> dict[str, float]:
    """Write every file, of the layouts only the ``wanted`` ones (None: all); {name: seconds}.

    The writers run side by side, the device makes the values.
    """
    spec = dit.workload(tiny).spec
    config = GemmaConfig() if not tiny else replace(
        GemmaConfig(), vocab_size=VOCABULARY, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1)
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def timed(name: str, work) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = round(time.perf_counter() - start, 2)
        print(f"wrote {name} in {seconds[name]} s", flush=True)

    start = time.perf_counter()
    exact = {name: t.cpu() for name, t in network(spec).items()}
    half = {name: t.to(torch.bfloat16) for name, t in exact.items()}
    seconds["make the network"] = round(time.perf_counter() - start, 2)
    writers = ((weights.write_pth, exact), (weights.write_safetensors, half), (weights.write_diffusers, half))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(timed, path.name, lambda w=write, p=path, v=values: w(p, v, spec))
                for (layout, path), (write, values) in zip(layouts(base).items(), writers)
                if wanted is None or layout in wanted]
        text = gemma_state(config) | {"spiece_model": torch.frombuffer(bytearray(tokenizer()), dtype=torch.uint8).clone()}
        metadata = {"config": json.dumps(asdict(config))} if tiny else None
        jobs.append(pool.submit(timed, TEXT, lambda: save_file(text, base / "models" / "text_encoders" / TEXT, metadata)))
        jobs.append(pool.submit(timed, VAE, lambda: save_file(vae_state(tiny), base / "models" / "vae" / VAE)))
        for job in jobs:
            job.result()
    return seconds


def main(arguments: list[str]) -> int:
    base, start = Path(arguments[0]), time.perf_counter()
    seconds = write_all(base, "--tiny" in arguments)
    total = sum(f.stat().st_size for f in (base / "models").rglob("*") if f.is_file())
    print(json.dumps({"seconds": seconds, "total_s": round(time.perf_counter() - start, 1), "gib": round(total / 2**30, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
