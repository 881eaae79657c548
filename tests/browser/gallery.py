"""What our workflows consist of, as data: nodes in columns, links by name, notes. ``save_workflows.py`` builds them in the
real frontend and saves what the frontend writes. Here: the parts, and the workflows of clips; those of long video are in
``gallery_long.py``. Not covered: node sizes and saved positions (measured in the browser).
"""

from __future__ import annotations

from dataclasses import dataclass, field

HUB = "https://huggingface.co"
MODEL_480P = ("SANA_Video_2B_480p.pth", "diffusion_models",
              f"{HUB}/Efficient-Large-Model/SANA-Video_2B_480p/resolve/main/checkpoints/SANA_Video_2B_480p.pth")
GEMMA = ("gemma_2_2b_it_elm_bf16.safetensors", "text_encoders",
         f"{HUB}/Comfy-Org/PixelDiT/resolve/main/text_encoders/gemma_2_2b_it_elm_bf16.safetensors")
WAN_VAE = ("wan_2.1_vae.safetensors", "vae",
           f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors")
FILES_480P = (MODEL_480P, GEMMA, WAN_VAE)
EMBEDDED = "embedded mini"
COLOURS = ("#3f789e", "#8a6d3b", "#4a7a4a", "#7a4a6e")  # of the column groups, from left to right


@dataclass(frozen=True)
class Item:
    """One node. ``links`` is {input: (key of the source, name of its output)}; ``files`` are (name, folder, url) it needs."""

    key: str
    type: str
    widgets: dict = field(default_factory=dict)
    links: dict = field(default_factory=dict)
    title: str | None = None
    size: tuple[int, int] = (320, 0)  # 0: as high as the content
    files: tuple = ()


@dataclass(frozen=True)
class Column:
    """Nodes one below the other, framed by a group with a title."""

    title: str
    items: tuple[Item, ...]


def note(text: str, size: tuple[int, int]) -> Item:
    return Item("note", "MarkdownNote", {"": text.strip()}, size=size, title="Read me")


def loader(model: str, files: tuple = (), mode: str = "auto") -> Item:
    names = {folder: name for name, folder, _ in files}
    return Item("load", "SanaVideoLoader", {
        "model": model, "precision": "auto", "mode": mode, "text_encoder": names.get("text_encoders", "none"),
        "vae": names.get("vae", "none")}, size=(380, 0), files=files)


def prompt(text: str, motion: int, negative: str | None = None, height: int = 430, key: str = "text",
           title: str | None = None) -> Item:
    """``negative`` None keeps the node's own default, which is the official negative prompt."""
    more = {} if negative is None else {"negative_prompt": negative}
    return Item(key, "SanaVideoTextEncode", {"prompt": text, "motion_score": motion, **more},
                {"clip": ("load", "clip")}, title, (440, height))


def canvas(width: int, height: int, frames: int = 81) -> Item:
    return Item("latent", "SanaVideoEmptyLatent", {"width": width, "height": height, "frames": frames, "batch_size": 1},
                {"model": ("load", "model")}, size=(440, 0))


def ksampler(seed: int, steps: int, cfg: float, sampler: str, latent: str = "latent") -> Item:
    return Item("sample", "KSampler", {"seed": seed, "control_after_generate": "randomize", "steps": steps, "cfg": cfg,
                                       "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0},
                {"model": ("load", "model"), "positive": ("text", "positive"), "negative": ("text", "negative"),
                 "latent_image": (latent, "latent")})


def video(prefix: str, samples: tuple[str, str] = ("sample", "LATENT")) -> tuple[Item, ...]:
    return (Item("decode", "SanaVideoDecode", {}, {"samples": samples, "vae": ("load", "vae")}, size=(400, 0)),
            Item("create", "CreateVideo", {"fps": 16}, {"images": ("decode", "frames")}, size=(400, 0)),
            Item("save", "SaveVideo", {"filename_prefix": prefix, "format": "mp4", "codec": "h264"},
                 {"video": ("create", "VIDEO")}, size=(400, 0)))


def file_list(files: tuple = FILES_480P) -> str:
    rows = [f"- **models/{folder}**: [{name}]({url.replace('/resolve/', '/blob/')})" for name, folder, url in files]
    return "\n".join(rows)


CAT = ("A fluffy orange cat rides a wooden surfboard across a bright turquoise wave at golden hour. It leans into the turn, its "
       "fur and whiskers blown back by the wind, while droplets of spray glitter in the low sun. Behind it the wave curls into a "
       "glassy barrel, and on the far shore palm trees sway in front of soft pink clouds. The camera follows closely from the "
       "side, at the height of the water, and slowly moves ahead of the cat. Realistic, sharp detail, warm light, "
       "shallow depth of field.")
WAKES = ("The scene of the picture comes to life. The camera moves slowly forward while the light changes gently, leaves and "
         "fabric stir in a soft breeze, and small particles of dust float through the air. Realistic, natural motion, "
         "sharp detail.")

T2V_NOTE = f"""
## Text to video, 480p

**1. Three files**, then press **R** so that the lists are read again:
{file_list()}

**2.** Write what the video shows: subject, place, light, camera, movement. 80 to 100 words work best.

**3.** Press **Run**. 832 x 480, 81 frames, 5 seconds.

*motion score*: 10 is calm, 30 lively. *steps*: 20 is a quick look, 50 is what the official script uses. *cfg*: 6.
More help: select a node and press the **i** above it.
"""
OFFICIAL_NOTE = f"""
## Text to video, 480p, as the official script does it

Official solver (flow-DPM), 50 steps, CFG 6, the shift of the model. Slower than the plain workflow; use it to compare.

**Three files**, then press **R**:
{file_list()}

To try another shift, put *ModelSamplingSD3* between the loader and its two receivers in *Sample*.
"""
I2V_NOTE = f"""
## Image to video, 480p

**1. Three files**, then press **R**:
{file_list()}

**2.** Choose a picture in *Load Image*. It becomes the first frame; *crop* keeps its proportions.

**3.** Describe the picture and what happens next. Press **Run**.
"""
MINI_NOTE = """
## The embedded model: runs anywhere, no downloads

Press **Run**. A small model that comes with the pack draws coloured shapes that move; on two CPU cores it takes well under a
minute. It uses the same nodes as the 2B model.

It knows: red, yellow, green, blue, purple, white · circle, square, triangle, star · stays still, slides left and right,
bounces up and down, moves in a circle, spins, grows and shrinks, moves to the right, moves to the left · black, grey, navy
background · one thing, or two (*A red star spins above a blue circle ...*).
"""


def t2v_480p() -> tuple[Column, ...]:
    return (Column("1 · Models", (note(T2V_NOTE, (380, 370)), loader(MODEL_480P[0], FILES_480P),)),
            Column("2 · Prompt and size", (prompt(CAT, 30), canvas(832, 480))),
            Column("3 · Sample", (ksampler(1, 30, 6.0, "dpmpp_2m"),)),
            Column("4 · Video", video("video/sana_video")))


def t2v_480p_official_sampler() -> tuple[Column, ...]:
    sample = (
        Item("noise", "RandomNoise", {"noise_seed": 1, "control_after_generate": "randomize"}),
        Item("guider", "CFGGuider", {"cfg": 6.0}, {"model": ("load", "model"), "positive": ("text", "positive"),
                                                   "negative": ("text", "negative")}),
        Item("solver", "SanaVideoSampler", {"solver": "flow-DPM"}),
        Item("sigmas", "SanaVideoSigmas", {"schedule": "flow-DPM", "steps": 50, "denoise": 1.0}, {"model": ("load", "model")}))
    run = Item("sample", "SamplerCustomAdvanced", {}, {
        "noise": ("noise", "NOISE"), "guider": ("guider", "GUIDER"), "sampler": ("solver", "sampler"),
        "sigmas": ("sigmas", "sigmas"), "latent_image": ("latent", "latent")})
    return (Column("1 · Models", (note(OFFICIAL_NOTE, (380, 290)), loader(MODEL_480P[0], FILES_480P),)),
            Column("2 · Prompt and size", (prompt(CAT, 30), canvas(832, 480))),
            Column("3 · Noise, guidance, solver", sample),
            Column("4 · Sample", (run,)),
            Column("5 · Video", video("video/sana_video_official", ("sample", "output"))))


def i2v_480p() -> tuple[Column, ...]:
    picture = Item("image", "LoadImage", {"image": "example.png"}, size=(380, 360))
    first = Item("first", "SanaVideoFirstFrame", {"fit": "crop"},
                 {"latent": ("latent", "latent"), "vae": ("load", "vae"), "image": ("image", "IMAGE")}, size=(440, 0))
    return (Column("1 · Models and picture", (note(I2V_NOTE, (380, 280)), loader(MODEL_480P[0], FILES_480P), picture)),
            Column("2 · Prompt, size, first frame", (prompt(WAKES, 10, height=390), canvas(832, 480), first)),
            Column("3 · Sample", (ksampler(1, 30, 6.0, "euler", "first"),)),
            Column("4 · Video", video("video/sana_video_i2v")))


def mini_t2v() -> tuple[Column, ...]:
    text = "A red circle bounces up and down on a black background."
    return (Column("1 · Models", (note(MINI_NOTE, (380, 300)), loader(EMBEDDED),)),
            Column("2 · Prompt and size", (prompt(text, 10, negative="", height=360), canvas(160, 96))),
            Column("3 · Sample", (ksampler(3, 20, 3.0, "euler"),)),
            Column("4 · Video", video("video/sana_video_mini")))


WORKFLOWS = {function.__name__: function for function in (t2v_480p, t2v_480p_official_sampler, i2v_480p, mini_t2v)}
