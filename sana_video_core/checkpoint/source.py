"""From a path (or a state dict) to a flat table of weights, whatever container they came in.

Containers: safetensors, sharded safetensors, ``.pth``/``.pt`` with the official wrappers, a diffusers repository or its
transformer folder, a dictionary. Headers are checked before a tensor is made; tensors are views of the mapped file, so nothing
is read until it is used. Names lose the prefixes of ComfyUI and of training wrappers. Not covered: which model it is
(``detect.py``), names and shapes (``convert.py``).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from . import integrity
from .header import damaged, read_header, strict_json, unreadable
from .keys import UNUSED
from .pth import load_pth, refused

log = logging.getLogger(__name__)

SPEC_KEY = "sana_video_spec"  # metadata entry, or a uint8 tensor of the same text (what ComfyUI's ModelSave can carry)
CONFIG_KEY = "diffusers_config"
MAX_JSON_BYTES = 16 << 20
# As ComfyUI's ModelSave, a bare submodule, diffusers, and training wrappers write them; the longest first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.", "")
COMPANIONS = ("first_stage_model.", "vae.", "cond_stage_model.", "text_encoders.", "conditioner.")
OUR_CLASSES = {"SanaVideoTransformer3DModel": False, "SanaVideoCausalTransformer3DModel": True}  # value: causal
PART_CLASSES = {"transformer": tuple(OUR_CLASSES), "vae": ("AutoencoderKLWan",)}  # parts of a diffusers repository
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LAYER = re.compile(r"(transformer_)?blocks\.\d+\.")


@dataclass(frozen=True)
class Source:
    """Where weights came from.

    ``container``: 'safetensors', 'sharded safetensors', 'pth' or 'state dict'; 'diffusers ' before it for a folder, and
    ':wrapper' behind it when the weights lay inside an entry such as 'generator'. ``metadata`` holds the header's texts, and the
    folder's config.json as text under 'diffusers_config'. ``verified``: a checksum over the weights was compared.
    """

    path: str | None
    container: str
    metadata: dict[str, str] = field(default_factory=dict)
    wrapper: str | None = None
    config: dict | None = None
    verified: bool = False

    @property
    def name(self) -> str:
        """The file's or folder's name, for messages."""
        return Path(self.path).name if self.path else "state dict"


def read_state_dict(source, *, verify: bool | None = None, part: str = "transformer") -> tuple[dict[str, Tensor], Source]:
    """({name: tensor}, where it came from) of any container; names without prefixes, unused official tensors left out.

    source: a path, or a dictionary of tensors (also in the official wrappers). Tensors can be read-only views of a file.
    verify: compare our own files' checksum; None = up to 1 GiB (``integrity.VERIFY_LIMIT``).
    part:   'transformer' or 'vae', the folder of a diffusers repository to read. Raises CheckpointError.
    """
    if isinstance(source, Mapping):
        state, wrapper = _unwrap(dict(source), "state dict")
        origin = Source(None, "state dict", wrapper=wrapper)
    else:
        state, origin = _read_path(Path(source), verify, part)
    if origin.wrapper:
        origin = replace(origin, container=f"{origin.container}:{origin.wrapper}")
    state, metadata = _spec_tensor(_strip(state, origin.name), dict(origin.metadata), origin.name)
    return state, replace(origin, metadata=metadata)


def _read_path(path: Path, verify: bool | None, part: str) -> tuple[dict[str, Tensor], Source]:
    if path.is_dir():
        return _read_folder(path, verify, part)
    if path.name.endswith(".safetensors.index.json"):
        return _read_shards(path, verify)
    shard = _SHARD.fullmatch(path.name)
    if shard:  # one of several: its index tells the others
        return _read_shards(path.with_name(f"{shard[1]}.safetensors.index.json"), verify)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path.name} is neither a file nor a folder", action="Choose a model file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error
    if magic == b"GGUF" or path.suffix == ".gguf":
        raise CheckpointError(f"The file {path.name} is a GGUF file, which this version cannot run", found="GGUF",
                              expected="safetensors or .pth", action="Choose the model as safetensors")
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin") or magic == b"PK\3\4":
        if magic != b"PK\3\4":
            raise refused(path.name, f"a file that begins with {magic!r}", "a PyTorch archive (torch.save since 1.6)")
        state, wrapper = _unwrap(load_pth(path), path.name)
        return state, Source(str(path), "pth", wrapper=wrapper)
    if path.suffix not in (".safetensors", ".sft"):
        raise CheckpointError(f"The file {path.name} is of no known kind", found=path.suffix or "no extension",
                              expected=".safetensors, .pth, .pt, or a diffusers folder")
    state, metadata, verified = _read_safetensors(path, verify)
    config = _config_beside(path)
    if config:
        metadata.setdefault(CONFIG_KEY, json.dumps(config))
    return state, Source(str(path), "safetensors", metadata, config=config, verified=verified)


def _read_safetensors(path: Path, verify: bool | None) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """(mapped tensors, metadata, verified). The header is checked first."""
    infos, metadata = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in infos}
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise damaged(path.name, str(error)[:160]) from error
    except OSError as error:
        raise unreadable(path, error) from error
    value = metadata.get(integrity.CHECK_KEY)
    size = sum(info.end - info.start for info in infos.values())
    if value is None or verify is False or (verify is None and size > integrity.VERIFY_LIMIT):
        log.info("%s: weights not verified (%s)", path.name, "no checksum in the file" if value is None else "left out")
        return state, metadata, False
    integrity.verify(state, value, metadata.get(SPEC_KEY, ""), path.name)
    return state, metadata, True


def _read_folder(folder: Path, verify: bool | None, part: str) -> tuple[dict[str, Tensor], Source]:
    """A diffusers repository (its transformer or vae folder) or such a folder itself."""
    inner = folder / part
    folder = inner if inner.is_dir() else folder
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is not None:
        _require_class(config, folder, PART_CLASSES[part])
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(p for p in folder.glob("*.safetensors") if not _SHARD.fullmatch(p.name))
    choices = indices or files
    if len(choices) > 1:
        choices = [p for p in choices if p.name.startswith("diffusion_pytorch_model.safetensors")] or choices
    if len(choices) != 1:
        shards = any(_SHARD.fullmatch(p.name) for p in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"The folder {folder.name} holds no single model",
            found=", ".join(p.name for p in choices[:4]) or ("shards without their index" if shards else "no safetensors file"),
            expected="one .safetensors file, or one .safetensors.index.json with its shards",
            action="Copy diffusion_pytorch_model.safetensors.index.json beside its shards" if shards else
            f"Choose the folder that holds the {part}'s files")
    state, origin = _read_path(choices[0], verify, part)
    metadata = dict(origin.metadata)
    if config is not None:
        metadata[CONFIG_KEY] = json.dumps(config)
    return state, replace(origin, path=str(folder), container=f"diffusers {origin.container}", metadata=metadata, config=config)


def _read_shards(index: Path, verify: bool | None) -> tuple[dict[str, Tensor], Source]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index.name, "an index without a weight_map")
    state: dict[str, Tensor] = {}
    config = _config_beside(index)
    metadata: dict[str, str] = {CONFIG_KEY: json.dumps(config)} if config else {}
    checks = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise damaged(index.name, f"the shard name {shard[:80]!r}", "plain names of safetensors files in the same folder")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"The model {index.name} is not complete", found=f"no file {shard}",
                                  expected=f"{len(set(weight_map.values()))} files beside it", action="Download the missing file")
        part, meta, verified = _read_safetensors(index.parent / shard, verify)
        wanted = {name for name, file in weight_map.items() if file == shard}
        if wanted != set(part):
            name = sorted(wanted ^ set(part))[0]
            raise damaged(shard, f"the tensor {name[:80]!r} is {'missing' if name in wanted else 'not in the index'}")
        state.update(part)
        metadata = meta | metadata
        checks.append(verified)
    return state, Source(str(index), "sharded safetensors", metadata, config=config, verified=all(checks))


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(path.name, f"{path.stat().st_size} bytes", f"at most {MAX_JSON_BYTES}")
        return strict_json(path.read_bytes().strip(), path.name)
    except OSError as error:
        raise unreadable(path, error) from error


def _config_beside(path: Path) -> dict | None:
    """The config.json beside a file that diffusers wrote, if it is of our classes."""
    beside = path.with_name("config.json")
    if not path.name.startswith("diffusion_pytorch_model") or not beside.is_file():
        return None
    config = _read_json(beside)
    return config if config.get("_class_name") in OUR_CLASSES else None


def _require_class(config: dict, folder: Path, classes: tuple[str, ...]) -> None:
    name = config.get("_class_name")
    if name is not None and name not in classes:
        raise CheckpointError(f"The folder {folder.name} holds another model", found=str(name)[:80],
                              expected=" or ".join(classes), action="Choose a SANA-Video folder")


def _unwrap(data: dict, name: str) -> tuple[dict[str, Tensor], str | None]:
    """(state dict, wrapper) of an official container; other entries (optimizer, step, critic) are ignored (model spec 2.3)."""
    wrapper = None
    if isinstance(data.get("generator"), dict):
        data, wrapper = data["generator"], "generator"
    for key in ("state_dict", "state_dict_ema"):
        if isinstance(data.get(key), dict):
            data, wrapper = data[key], wrapper or key
            break
    if not all(isinstance(key, str) for key in data):
        raise refused(name, "weights without names")
    strange = [key for key, value in data.items() if not isinstance(value, Tensor)]
    if strange:
        raise refused(name, f"entries that are no tensors: {', '.join(key[:60] for key in strange[:4])}",
                      "weights at the top, or under 'generator', 'state_dict' or 'state_dict_ema'")
    for key, tensor in data.items():
        _require_plain(key, tensor, name)
    return {key: tensor.detach() for key, tensor in data.items()}, wrapper


def _require_plain(key: str, tensor: Tensor, name: str) -> None:
    """Refuse everything but a dense tensor whose elements lie in its own memory."""
    odd = None
    if tensor.layout != torch.strided or tensor.is_nested:
        odd = f"{'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} layout"
    elif tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        odd = "a quantised or lazily changed tensor"
    elif tensor.numel() == 0:
        odd = "no elements"
    elif not tensor.is_meta and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        odd = f"shape {list(tensor.shape)[:8]} over {tensor.untyped_storage().nbytes()} bytes"
    if odd:
        raise refused(name, f"tensor {key[:80]} with {odd}", "plain dense tensors")


def _strip(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Names without the prefix under which the network lies, without unused tensors and the parts of a whole checkpoint."""
    prefix = next((p for p in PREFIXES if any(key.startswith(p) and _LAYER.match(key, len(p)) for key in state)), "")
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        short = key[len(prefix):] if key.startswith(prefix) else key
        if UNUSED.fullmatch(short) or (prefix and key.startswith(COMPANIONS)):
            continue
        if short in out:
            raise damaged(name, f"the tensor {short[:80]!r} twice, with and without the prefix {prefix!r}")
        out[short] = tensor
    return out


def _spec_tensor(state: dict[str, Tensor], metadata: dict, name: str) -> tuple[dict[str, Tensor], dict]:
    """Take the spec that ComfyUI's ModelSave carried as a tensor of bytes into the metadata."""
    tensor = state.pop(SPEC_KEY, None)
    if tensor is not None:
        if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > 1 << 16:
            raise damaged(name, f"the tensor {SPEC_KEY} of {tensor.dtype} {list(tensor.shape)}", "a short row of bytes")
        try:
            metadata.setdefault(SPEC_KEY, bytes(tensor.tolist()).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise damaged(name, f"the tensor {SPEC_KEY} is no text") from error
    return state, metadata
