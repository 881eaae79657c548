"""Two hundred hostile and damaged .pth files: nothing runs, nothing is written, every one is refused in words.

The pickles are written by hand, opcode by opcode: nothing here imports a pickler.
"""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import random_state, same, small_spec

from sana_video_core.checkpoint import convert, load_transformer
from sana_video_core.checkpoint.pth import MAX_PROGRAM_BYTES, check_program
from sana_video_core.errors import CheckpointError

COUNT = max(200, int(os.environ.get("SANA_VIDEO_MUTATIONS", "200")) // 10)
SECONDS = 2.0  # of this process' own time
SPEC = small_spec(depth=1, width=16, linear_head_dim=8, cross_heads=2, ffn_hidden=24, caption_channels=12)


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """GLOBAL, arguments as a tuple, REDUCE."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def program(body: bytes) -> bytes:
    """A protocol 2 pickle whose result is {'state_dict': {'a': body}}."""
    return b"\x80\x02}" + text("state_dict") + b"}" + text("a") + body + b"ss."


def archive(pickled: bytes, records: dict[str, bytes] | None = None, packed: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, around this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as file:
        file.writestr("m/data.pkl", pickled)
        file.writestr("m/byteorder", b"little")
        for name, data in (records or {"m/data/0": b"\0" * 64}).items():
            file.writestr(name, data)
        file.writestr("m/version", b"3\n")
    return out.getvalue()


def storage(kind: str, elements: int, key: str = "0") -> bytes:
    """The persistent id of a storage, as torch.save writes it."""
    number = b"J" + struct.pack("<i", elements)
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number + b"tQ"


def rebuilt(elements: int, size: int) -> bytes:
    """torch._utils._rebuild_tensor_v2 of a storage that claims ``elements`` floats."""
    number = b"J" + struct.pack("<i", size)
    return call("torch._utils", "_rebuild_tensor_v2", storage("FloatStorage", elements), b"K\0", b"(" + number + b"t",
                b"(K\x01t", b"\x89", call("collections", "OrderedDict"))


def calls(canary: str) -> list[bytes]:
    """Pickles that would do harm if anything in them ran."""
    touch, code = text(f"touch {canary}"), text(f"open({canary!r}, 'w')")
    big = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    return [
        call("os", "system", touch), call("posix", "system", touch), call("nt", "system", touch),
        call("subprocess", "Popen", touch), call("subprocess", "getoutput", touch), call("builtins", "eval", code),
        call("builtins", "exec", code), call("__builtin__", "eval", code), call("builtins", "open", text(canary), text("w")),
        call("io", "open", text(canary), text("w")), call("pathlib", "Path.touch", text(canary)),
        call("builtins", "__import__", text("os")), call("importlib", "import_module", text("antigravity")),
        call("builtins", "getattr", text("x"), text("upper")), call("operator", "attrgetter", text("system")),
        call("torch.hub", "load", text("x/y"), text("z")), call("torch", "load", text(canary)),
        call("torch.serialization", "load", text(canary)), call("torch._utils", "_rebuild_parameter_with_state", touch),
        call("torch.utils.cpp_extension", "load_inline", touch), call("torch.nn.modules.module", "Module"),
        call("numpy", "load", text(canary)), call("numpy.core.multiarray", "_reconstruct", touch), call("ctypes", "CDLL", touch),
        call("builtins", "bytearray", big), call("torch.storage", "UntypedStorage", big), call("torch", "Tensor", big),
        call("torch._utils", "_rebuild_sparse_tensor", touch), call("torch._utils", "_rebuild_nested_tensor", touch),
        call("torch._utils", "_rebuild_qtensor", touch), call("torch._utils", "_rebuild_wrapper_subclass", touch),
        call("torch._utils", "_rebuild_device_tensor_from_numpy", touch), call("torch._tensor", "_rebuild_from_type_v2", touch),
        call("collections", "Counter", touch), call("_codecs", "encode", text("x"), text("bz2")), call("builtins", "set"),
        call("webbrowser", "open", text("http://localhost")), call("socket", "create_connection", touch),
        call("shutil", "rmtree", text(canary)), call("asyncio", "run", touch), call("timeit", "timeit", code),
        text("os") + text("system") + b"\x93" + b"(" + touch + b"tR",  # STACK_GLOBAL
        b"(" + touch + b"ios\nsystem\n",  # INST
        b"(cos\nsystem\n" + touch + b"o",  # OBJ
        b"cos\nsystem\n" + b"(" + touch + b"t\x81",  # NEWOBJ
        b"\x82\x01",  # EXT1
        b"Pm\n",  # PERSID
        b"}" + b"2" * 1000 + b"0" * 1000,  # DUP
    ]


def bombs() -> list[bytes]:
    """Whole files that claim more than they hold, or would grow."""
    good = program(rebuilt(16, 16))
    flat = zipfile.ZIP_DEFLATED
    return [
        archive(program(rebuilt(1 << 30, 16))), archive(program(rebuilt(17, 16))), archive(program(rebuilt(16, 17))),
        archive(program(rebuilt(16, 1 << 30))), archive(program(rebuilt(-1, 16))), archive(program(rebuilt(16, -1))),
        archive(good, packed=flat), archive(good, {"m/data/0": b"\0" * 50_000_000}, flat),
        archive(good, {"m/data/1": b"\0" * 64}),
        archive(b"\x80\x02" + b"]" * (MAX_PROGRAM_BYTES + 1) + b"."), archive(b"\x80\x02" + b"]0" * 400_000 + b"."),
        archive(b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."), archive(b""), archive(b"."), archive(b"\x80\x02}"),
        archive(b"\x80\x02]."), archive(b"\x80\x02K\x01."), archive(b"\x80\x02N."), archive(b"\x80\x05}."),
        archive(b"\x80\x02}K\x01K\x02s."), archive(b"\x80\x02}" + text("a") + b"]s."), archive(b"\x80\x02h\0."),
        archive(good, {"m/data/0": b"\0" * 64, "n/data.pkl": good}), b"PK\3\4" + b"\0" * 100, b"PK\5\6" + b"\0" * 18,
        archive(good)[:-30], archive(good)[30:], b"", b"\x80\x02}.", b"\x80\x02" + calls("/nowhere")[0] + b".",
    ]


def mutated(rng: random.Random, whole: bytes) -> bytes:
    """A good official file with a random damage: cut, bits flipped anywhere, a piece moved, bytes put in."""
    out = bytearray(whole)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(out[:rng.randrange(len(out))])
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:  # inside the pickle, which comes first
        out[rng.randrange(60, 3000)] = rng.randrange(256)
    elif kind == 3:  # inside the archive's directory, which comes last
        out[-rng.randrange(1, 2000)] ^= 1 << rng.randrange(8)
    else:
        place = rng.randrange(len(out))
        out[place:place] = rng.randbytes(rng.randrange(1, 100))
    return bytes(out)


def refused(path: Path, state: dict) -> bool:
    """True when the file is refused in words; False when it gives exactly the good weights. Anything else fails."""
    started = time.process_time()
    try:
        model = load_transformer(path, SPEC, torch.float32)
    except CheckpointError as error:
        assert path.name in str(error)
        return True
    finally:
        assert time.process_time() - started < SECONDS
    assert same(model.state_dict(), state), "a damaged file was believed"
    return False


def test_hostile_and_damaged_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    state = random_state(SPEC)
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    native = convert(state, SPEC)
    assert not refused(tmp_path / "good.pth", native)
    rng = random.Random(11)
    hostile = [archive(program(body)) for body in calls(str(canary))] + bombs()
    count = harmless = 0
    path = tmp_path / "hostile.pth"
    while count < COUNT:
        path.unlink(missing_ok=True)
        path.write_bytes(hostile[count] if count < len(hostile) else mutated(rng, whole))
        out = refused(path, native)
        assert out or count >= len(hostile), f"hostile file {count} was accepted"
        harmless += not out
        count += 1
    print(f"{count} files: {count - harmless} refused, {harmless} harmless (same weights), 0 executed")
    assert count >= 200 and harmless < count // 3
    assert not canary.exists() and {p.name for p in tmp_path.iterdir()} == {"good.pth", "hostile.pth"}


@pytest.mark.parametrize("index", range(len(calls("x"))))
def test_harmful_programs_are_refused_before_anything_runs(index, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("torch.load was reached")

    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CheckpointError, match=r"m\.pth is not accepted"):
        check_program(program(calls("x")[index]), "m.pth")


def test_a_storage_that_claims_another_record_is_refused(tmp_path):
    (tmp_path / "m.pth").write_bytes(archive(program(rebuilt(24, 24)), {"m/data/0": b"\0" * 64, "m/data/1": b"\1" * 64}))
    with pytest.raises(CheckpointError, match="storage of 96 bytes"):
        load_transformer(tmp_path / "m.pth", SPEC)


def test_flipped_weights_of_a_pth_are_noticed_by_the_archives_checksums(tmp_path):
    state = random_state(SPEC)
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    whole = (tmp_path / "m.pth").read_bytes()
    place = whole.index(state["t_block.1.weight"].numpy().tobytes())
    (tmp_path / "m.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    with pytest.raises(CheckpointError, match="m.pth is damaged.*CRC"):
        load_transformer(tmp_path / "m.pth", SPEC)
