"""Official ``.pth`` / ``.pt`` files: an archive checked by hand, then PyTorch's weights-only loader, then plain tensors only.

A pickle is a program. Three fences: the archive must hold plain stored records that fit the file; the program may only name
the few functions that rebuild dense tensors (read as text, without running it); and ``torch.load(weights_only=True)`` runs it,
with a torch that has the fixes of 2025 and 2026 (reliability spec 2, row 3). Data is mapped, not read. Not covered: the old
format without an archive, and what the tensors mean (``source.py``).
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import damaged, unreadable
from .integrity import VERIFY_LIMIT

MINIMUM_TORCH = (2, 10)
MAX_PROGRAM_BYTES = 4 << 20  # 500 tensors take 70 KB
MAX_STEPS = 500_000
MAX_RECORDS = 20_000
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch \w+Storage"
    r"|torch (float64|float32|float16|bfloat16|u?int(8|16|32|64)|bool|float8_\w+)|torch Size|torch device")
_STEPS = frozenset(  # what pickle protocol 2 needs for dictionaries of tensors
    "PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL REDUCE BUILD BINPERSID SETITEM "
    "SETITEMS APPEND APPENDS BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NEWTRUE NEWFALSE NONE BINPUT LONG_BINPUT "
    "BINGET LONG_BINGET BINSTRING SHORT_BINSTRING POP".split())
_SAVE_AGAIN = "Use a safetensors file, or save only the state dict with a current PyTorch"


def require_torch(version: str = torch.__version__) -> None:
    """Refuse a PyTorch whose weights-only loader has known holes."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_TORCH:
        raise CheckpointError("This PyTorch is too old to open .pth files safely", found=f"torch {version}",
                              expected=f"torch {'.'.join(map(str, MINIMUM_TORCH))} or newer",
                              action="Update PyTorch, or use the model as a safetensors file")


def load_pth(path: Path) -> dict:
    """The top-level dictionary of an official .pth file, its tensors mapped from the file; not yet checked for meaning."""
    require_torch()
    records = check_archive(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # the loader's own error classes share no base below Exception
        raise refused(path.name, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}") from error
    if not isinstance(data, dict):
        raise refused(path.name, f"a {type(data).__name__} at the top", "a dictionary of weights")
    _require_whole_records(data, records, path.name)
    return data


def refused(name: str, found: str, expected: str | None = None) -> CheckpointError:
    """The error for a .pth file that is not opened."""
    return CheckpointError(f"The file {name} is not accepted as a .pth model", found=found, expected=expected,
                           action=_SAVE_AGAIN)


def check_archive(path: Path) -> Counter:
    """Sizes of the data records of a well-formed archive whose program is harmless; else CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, path)
            program = [e for e in entries if e.filename.endswith("/data.pkl") or e.filename == "data.pkl"]
            if len(program) != 1 or program[0].file_size > MAX_PROGRAM_BYTES:
                raise refused(path.name, f"{len(program)} records data.pkl" if len(program) != 1 else
                              f"a data.pkl of {program[0].file_size} bytes", f"one of at most {MAX_PROGRAM_BYTES} bytes")
            check_program(archive.read(program[0]), path.name)
            if path.stat().st_size <= VERIFY_LIMIT:
                _check_sums(archive, entries)
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, RuntimeError, UnicodeDecodeError, EOFError, IndexError) as error:
        advice = ("Download or copy the file again; if it was saved with PyTorch's checksums switched off, save it with them"
                  if "CRC" in str(error) else "")
        raise damaged(path.name, str(error)[:160] or type(error).__name__, "a PyTorch archive", advice) from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path.name, str(error)[:160], "a PyTorch archive") from error
    return Counter(e.file_size for e in entries if "/data/" in f"/{e.filename}")


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Plain stored records under distinct names that do not overlap: no archive bombs."""
    if len(entries) > MAX_RECORDS or len({e.filename for e in entries}) != len(entries):
        raise refused(path.name, f"{len(entries)} records, some under the same name" if len(entries) <= MAX_RECORDS else
                      f"{len(entries)} records")
    end = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise refused(path.name, f"the record {entry.filename[:80]!r} is packed", "plain records, as torch.save writes them")
        if entry.header_offset < end:
            raise damaged(path.name, f"the record {entry.filename[:80]!r} overlaps another")
        end = entry.header_offset + 30 + len(entry.filename) + entry.file_size
    if end > path.stat().st_size:
        raise damaged(path.name, "records that reach beyond the end of the file")


def _check_sums(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    """Read every record once; zipfile compares the checksum, which PyTorch's reader does not."""
    for entry in entries:
        with archive.open(entry) as record:
            while record.read(1 << 20):
                pass


def check_program(program: bytes, name: str) -> None:
    """Refuse a pickle that names anything but the rebuilding of dense tensors. Reads it as text; runs nothing."""
    for step, (operation, argument, _) in enumerate(pickletools.genops(program)):
        if step > MAX_STEPS:
            raise refused(name, f"a pickle of more than {MAX_STEPS} steps")
        if operation.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
            raise refused(name, f"a pickle that calls for {str(argument)[:80].replace(' ', '.')}",
                          "dictionaries of plain dense tensors, numbers and texts")
        if operation.name not in _STEPS or (operation.name == "PROTO" and argument != 2):
            raise refused(name, f"a pickle with the step {operation.name}", "protocol 2, as torch.save writes it")


def _require_whole_records(data: dict, records: Counter, name: str) -> None:
    """Every storage must be one record of the archive: a pickle can claim more bytes than its record has."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(data) if t.layout == torch.strided}
    extra = Counter(storages.values()) - records
    if extra:
        raise damaged(name, f"a tensor storage of {next(iter(extra))} bytes", "the size of a record in the archive")


def _tensors(data: dict, depth: int = 3) -> list[Tensor]:
    """Tensors in ``data`` and in its dictionaries, three levels down."""
    found = []
    for value in data.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict) and depth:
            found += _tensors(value, depth - 1)
    return found
