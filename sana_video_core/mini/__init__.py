"""The embedded model: its world (pictures, sentences, judge), its weights, and how to load them.

A small SANA-Video of the same classes and files as the public ones (design: "mini"). ``files()`` names the weights,
``load()`` reads them through the core's own loaders, ``PROMPTS`` are example prompts; each contains a combination that
training never showed. Imports of torch and of the loaders happen on use.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SanaVideoError

FOLDER = Path(__file__).parent / "weights"
NAMES = {"transformer": "mini_transformer.safetensors", "vae": "mini_vae.safetensors", "text": "mini_text.safetensors"}
LONG = "mini_long_transformer.safetensors"
WINDOW = 2  # blocks that a film of the embedded model remembers, as in its training

PROMPTS = (
    "A red star bounces up and down on a navy background.",
    "A yellow triangle moves in a circle on a black background.",
    "A white star grows and shrinks on a navy background.",
    "A green square spins on a black background.",
    "A purple star moves to the right on a grey background.",
    "On a black background, a blue triangle slides left and right.",
    "A yellow circle moves to the left. The background is navy.",
    "A red triangle spins on a grey background.",
    "On a navy background, a white circle moves in a circle.",
    "A blue circle grows and shrinks on a black background.",
    "A green triangle bounces up and down. The background is grey.",
    "A yellow star slides left and right above a blue square that moves in a circle, on a black background.",
    "At the top a white triangle moves to the left, at the bottom a red square moves to the right, on a navy background.",
    "A green star stays still and below it a yellow square grows and shrinks. The background is black.",
    "A purple square bounces up and down and a green circle moves to the right on a grey background.",
    "A blue star moves to the left above a red triangle that spins, on a black background.",
)


def files() -> dict[str, Path]:
    """{"transformer", "vae", "text"} and, where this copy has it, "long" (the causal transformer) -> path of the weights.

    The first three are named whether they exist or not, so that a caller can say which is missing.
    """
    found = {part: FOLDER / name for part, name in NAMES.items()}
    if (FOLDER / LONG).is_file():
        found["long"] = FOLDER / LONG
    return found


def load(device="cpu", dtype=None, long: bool = False):
    """(transformer, text encoder, VAE) of the embedded model on ``device``, in ``dtype`` (default float32).

    ``long`` takes the causal transformer. Raises SanaVideoError where a file is missing.
    """
    import torch

    from ..checkpoint import load_transformer
    from ..text.encode import load_text_encoder
    from ..vae.loading import load_wan_vae

    paths, dtype = files(), dtype or torch.float32
    wanted = ["long" if long else "transformer", "text", "vae"]
    missing = [LONG if part == "long" else NAMES[part] for part in wanted if part not in paths or not paths[part].is_file()]
    if missing:
        raise SanaVideoError("The embedded model is not complete", found=f"missing {', '.join(missing)}",
                             expected=f"its files in {FOLDER}", action="Install the pack again")
    transformer = load_transformer(paths[wanted[0]], dtype=dtype, device=device, hint="long" if long else "clip")
    return transformer, load_text_encoder(paths["text"], dtype, device), load_wan_vae(paths["vae"], dtype, device)
