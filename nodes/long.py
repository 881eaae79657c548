"""What the nodes of long video share: the STATE wire, the network behind ComfyUI's memory management, texts of blocks, previews.

The block sampler calls the network itself (a sampler of ComfyUI would lose the state between steps), but through the same
loading, casting, patching and interrupting as core's samplers. Not covered: the nodes (one file each), films (``film.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError, StateError
from ..sana_video_core.sampling.schedule_text import Part, part_of
from ..sana_video_core.specs import ModelSpec
from ..sana_video_core.state import RecurrentState
from .common import bring, spec_of
from .shared_state import take_in

log = logging.getLogger(__name__)

State = io.Custom("SANA_VIDEO_STATE")
MARK = "sana_video_schedule"  # the key in a conditioning's dict that makes it one cue of a schedule
SAMPLED = 1024  # values of each weight that its fingerprint looks at
# Keys of a conditioning that the block sampler would have to ignore.
UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent", "concat_latent_image",
               "reference_latents", "noise_mask")


def require_state(value: object) -> RecurrentState:
    """``value`` with plain tensors if it is a state; they share their memory with the wire, so never write to them."""
    if not isinstance(value, RecurrentState):
        raise StateError("There is no state on this wire", found=type(value).__name__,
                         action="Connect the STATE output of 'SANA-Video Block Sampler' or 'SANA-Video Load State'")
    return take_in(value)


def long_spec(model: object) -> ModelSpec:
    """The spec of a MODEL that was made for long video; a clip model is refused, because its blocks would not hold together."""
    spec = spec_of(model)
    if not spec.causal:
        raise SanaVideoError("This model makes clips, not long video", found=spec.name, expected="a LongSANA model",
                             action="Load LongSANA; if the file is one, choose mode 'long' in 'Load SANA-Video'")
    return spec


def refuse_helpers(model) -> None:
    """Refuse what would skip, reorder or replace calls of the network: each call belongs to one state."""
    options = model.model_options
    inner = options.get("transformer_options", {})
    wrappers = {name for kinds in inner.get("wrappers", {}).values() for name, calls in kinds.items() if calls}
    found = [
        ("EasyCache or LazyCache", bool({"easycache", "lazycache"} & (set(inner) | {str(w).lower() for w in wrappers}))),
        ("context windows", "context_handler" in options),
        ("skip-layer guidance or another replacement of the network's blocks", bool(inner.get("patches_replace"))),
        ("a patch of the network's attention", any(inner.get("patches", {}).values())),
        ("a wrapper around the model", "model_function_wrapper" in options),
        ("another guidance", "sampler_cfg_function" in options or bool(options.get("sampler_post_cfg_function"))),
    ]
    for name, present in found:
        if present:
            raise SanaVideoError(f"The block sampler cannot run with {name}", found=f"{name} on the MODEL wire",
                                 action="Take that node out of the line to the block sampler: a step that is skipped or moved "
                                        "would leave a wrong state for all later blocks")
    if any("compile" in str(name).lower() for name in wrappers):
        log.info("The block sampler runs the network without torch.compile")


def weights_print(named) -> str:
    """Fingerprint of (name, tensor) pairs: names, shapes, dtypes and evenly spaced values of each."""
    import hashlib

    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, t in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name}|{tuple(t.shape)}|{t.dtype}|".encode())
        flat = t.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        digest.update(flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def model_print(model) -> str:
    """Fingerprint of the weights of a MODEL without its LoRAs; reckoned once for each loaded model."""
    inner = model.model
    if not hasattr(inner, "sana_video_print"):
        inner.sana_video_print = weights_print(stored_weights(model))
    return inner.sana_video_print


def stored_weights(model) -> list[tuple]:
    """(name, tensor) of all weights of a MODEL without its LoRAs; of a quantised weight the numbers and scales it consists of.

    ComfyUI's own list of them (``get_key_patches``) stops at the scales, which are no attributes of a layer. Scales of inputs are
    left out: a card gives the model those while it loads (``calibrate.py``), another one none, and both may go on with a film.
    """
    named = []
    with model.use_ejected():
        for key, weight in model.model.named_parameters():
            if key.startswith("diffusion_model.") and not key.endswith(".input_scale"):
                weight = model.backup[key].weight if key in model.backup else weight
                weight = model.hook_backup[key][0] if key in model.hook_backup else weight
                named += weight.state_dict(key).items() if hasattr(weight, "_qdata") else [(key, weight)]
    return named


def patches_print(model) -> str:
    """Fingerprint of the LoRAs on a MODEL, "" without any."""
    import hashlib

    import torch

    if not model.patches:
        return ""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(weights_print([("", value)]).encode())
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif hasattr(value, "weights"):  # one of ComfyUI's adapter classes
            digest.update(type(value).__name__.encode())
            add(value.weights)
        elif value is None or isinstance(value, (int, float, str, bool)):
            digest.update(repr(value).encode())

    for key in sorted(model.patches):
        digest.update(key.encode())
        add(model.patches[key])
    return digest.hexdigest()


class Network:
    """The network of a MODEL in the calling form of the core's block sampler. A context manager: one sampling run.

    ``shape``: the largest latent of the run ``[rows, C, T, H, W]``, for the estimate of working memory.
    """

    def __init__(self, model, shape: tuple[int, ...]):
        from ..sana_video_core.dit import SanaVideoTransformer

        refuse_helpers(model)
        self.patcher, self.shape, self._core = model, shape, SanaVideoTransformer
        self.spec, self.device = spec_of(model), model.load_device
        self._loaded = False

    def __enter__(self) -> Network:
        self._load()
        self.patcher.pre_run()
        return self

    def __exit__(self, *exc) -> None:
        self.patcher.cleanup()

    def release(self) -> None:
        """Another model may have taken the memory since; look again before the next call."""
        self._loaded = False

    def _load(self) -> None:
        if not self._loaded:
            bring(self.patcher, self.patcher.memory_required(self.shape))
            self._loaded = True

    def _network(self):
        self._load()
        network = self.patcher.model.diffusion_model
        network.compute_dtype = self.patcher.model.get_dtype_inference()
        return network

    def _hook(self, index: int, call: Callable, x):
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        return call(x, True)

    def _run(self, function, *args, **options):
        import comfy.model_management

        with comfy.model_management.cuda_device_context(self.device):
            return function(self._network(), *args, **options)

    def __call__(self, latent, timestep, caption, mask=None, *, state=None):
        return self._run(self._core.forward, latent, timestep, caption, mask, state=state, on_block=self._hook)

    def absorb(self, latent, caption, mask=None, *, state=None):
        return self._run(self._core.absorb, latent, caption, mask, state=state, on_block=self._hook)

    def read_text(self, caption, mask=None):
        return self._run(self._core.read_text, caption, mask)


# ----------------------------------------------------------------------------------------------------------------- texts

class Texts:
    """What a CONDITIONING says for each block: one text for all, or the cues of 'SANA-Video Prompt Schedule'."""

    def __init__(self, spec: ModelSpec, positive, negative=None, fps: float = 16.0, name: str = "positive"):
        self.spec, self.fps = spec, fps
        self.negative = None if negative is None else Texts(spec, negative, None, fps, "negative")
        entries = list(positive or ())
        if not entries:
            raise SanaVideoError(f"The {name} conditioning is empty", action="Connect 'SANA-Video Text Encode'")
        marks = [options.get(MARK) for _, options in entries]
        self.parts: tuple[Part, ...] | None = None
        if all(mark is not None for mark in marks):
            self.parts = marks[0]["parts"]
        elif any(mark is not None for mark in marks) or len(entries) > 1:
            raise SanaVideoError(f"The {name} conditioning joins several texts", found=f"{len(entries)} texts",
                                 action="Write them into one prompt, or one after the other into 'SANA-Video Prompt Schedule'")
        self._entries = [self._read(entry, name) for entry in entries]

    def _read(self, entry, name: str):
        from ..sana_video_core.sampling.guidance import Caption
        from .native import check_conditioning

        embedding, options = entry
        odd = [key for key in UNSUPPORTED if options.get(key) is not None]
        if odd:
            raise SanaVideoError(f"The {name} conditioning asks for what the block sampler cannot do", found=", ".join(odd),
                                 action="Connect the text encoder's conditioning directly")
        mask = options.get("attention_mask")
        check_conditioning(self.spec, embedding, mask)
        return Caption(embedding, mask), options.get(MARK)

    def of(self, span):
        """(Caption, prompt for people, motion score or None, seed or None) of one block."""
        if self.parts is None:
            return self._entries[0][0], "", None, None
        part, along = part_of(self.parts, span, self.fps, self.spec.vae.stride[0])
        index = self.parts.index(part)
        cues = [(caption, mark) for caption, mark in self._entries if mark["part"] == index]
        wanted = cues[0][1]["score"] if part.motion is None else round(part.motion[0] + along * (part.motion[1] - part.motion[0]))
        caption, mark = min(cues, key=lambda cue: abs(cue[1]["score"] - wanted))
        return caption, part.prompt, mark["score"], part.seed

    def condition(self, span):
        """The core's Condition of one block."""
        from ..sana_video_core.sampling.blocks import Condition

        return Condition(self.of(span)[0], None if self.negative is None else self.negative.of(span)[0])


# --------------------------------------------------------------------------------------------------------------- previews

def animated(frames: list, milliseconds: float):
    """A PIL picture that is saved as an animated PNG whatever the caller asks for."""
    from PIL import Image

    class Animated(Image.Image):
        def save(self, fp, format=None, **options):
            frames[0].save(fp, format="PNG", save_all=True, append_images=frames[1:], loop=0, duration=round(milliseconds),
                           compress_level=1)

    picture = frames[0].copy()
    picture.__class__ = Animated
    return picture


class Progress:
    """ComfyUI's progress bar over the steps of all blocks, with the running block as a small moving picture.

    Uses core's own preview path and respects its preview setting. Raises on Cancel, as core's bar does."""

    def __init__(self, model, blocks: int, steps: int, fps: float):
        import comfy.utils
        import latent_preview

        self.total, self.steps, self.first = blocks * steps, steps, None
        self.bar = comfy.utils.ProgressBar(max(1, self.total))
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.milliseconds = 1000 * model.model.spec.vae.stride[0] / fps

    def step(self, block: int, step: int, steps: int, x0) -> None:
        """The core sampler's ``on_step``."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self.first = block if self.first is None else self.first
        done = (block - self.first) * self.steps + step + 1
        self.bar.update_absolute(done, self.total, self._preview(x0))

    def _preview(self, x0):
        if self.previewer is None:
            return None
        frames = [self.previewer.decode_latent_to_preview(x0[:1, :, i:i + 1]) for i in range(x0.shape[2])]
        if len(frames) == 1:
            return ("PNG", frames[0], None)
        return ("PNG", animated(frames, self.milliseconds), None)


# ----------------------------------------------------------------------------------------------------------------- others

class LatentSpool:
    """Collects the finished blocks of a run for the LATENT output. Large films go through a file, so that memory stays flat. A
    context manager: where the run fails, the file goes.

    The tensor of a spooled film is mapped from the file, privately: a node that writes to it cannot change the file.
    """

    LIMIT = 64 << 20  # bytes that are simply kept

    def __init__(self, model, frames: int, shape: tuple[int, ...]):
        import tempfile
        from pathlib import Path

        import folder_paths

        self.process, self.shape = model.model.process_latent_out, shape
        self.frames, self.pieces, self.path = frames, [], None
        if frames * self._frame_bytes() > self.LIMIT:
            folder = Path(folder_paths.get_temp_directory())
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix="sana_video_", suffix=".latents", dir=folder)
            self.path, self.file = Path(path), open(handle, "wb")

    def __enter__(self) -> LatentSpool:
        return self

    def __exit__(self, failed, *exc) -> None:
        if failed is not None and self.path is not None:
            self.file.close()
            self.path.unlink(missing_ok=True)

    def _frame_bytes(self) -> int:
        import math

        return 4 * math.prod(self.shape)

    def add(self, latent) -> None:
        """A block ``[B, C, T, H, W]`` in the model's space."""
        raw = self.process(latent.float()).cpu()
        if self.path is None:
            self.pieces.append(raw)
        else:  # frame by frame, so that the file is one tensor with time first
            self.file.write(raw.permute(2, 0, 1, 3, 4).contiguous().numpy().tobytes())

    def result(self):
        """The LATENT tensor of all blocks."""
        import torch

        if self.path is None:
            return torch.cat(self.pieces, 2)
        self.file.close()
        batch, channels, height, width = self.shape
        count = self.path.stat().st_size // self._frame_bytes()
        flat = torch.from_file(str(self.path), shared=False, size=count * batch * channels * height * width, dtype=torch.float32)
        return flat.view(count, batch, channels, height, width).permute(1, 2, 0, 3, 4)


def summary(state: RecurrentState, fps: float = 16.0, stride: int = 4) -> str:
    """A readable line about a state."""
    seconds = (1 + (state.position - 1) * stride) / fps if state.position else 0.0
    memory = "all history" if not state.window else f"the last {state.window} blocks"
    return (f"{state.spec}: {state.blocks} blocks, {state.position} latent frames ({seconds:.1f}s at {fps:g} fps), "
            f"grid {state.grid[0]}x{state.grid[1]}, {memory}, {state.nbytes() / 2**20:.1f} MiB"
            f"{', can take its last block back' if state.undo is not None else ''}")
