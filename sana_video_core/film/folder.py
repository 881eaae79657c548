"""The run folder of a film: film.json, one file a block with its latent and the state after it, all atomic (design 3.4).

Files are numbered from 1, as people count. Whatever happens to the process, every file is whole; a block is finished when its
file carries the contract that the plan asks for. One process at a time may write (a lock that the system frees when the
process dies). Not covered: sampling (``make.py``), video (``video.py``).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SanaVideoError, StateError
from ..state import RecurrentState, Undo
from ..state.atomic import SYSTEM, disk_error, remove, remove_orphans, write_atomic
from ..state.files import build_state, check_layout, load_state, save_state, state_record, state_tensors
from ..state.sealed import Table, read_record, read_sealed, write_sealed
from .plan import FilmPlan

KIND, FORMAT = "film block", 1
MAX_BLOCK_BYTES = 16 << 30
PLAN, START, LOCK = "film.json", "start.safetensors", "film.lock"
_STATE = "state."
_BLOCK_FILE = re.compile(r"block_(\d{4,6})\.(safetensors|mp4)")


class Film:
    """One run folder. Use as a context manager; ``write=False`` reads without locking (also while another process writes)."""

    def __init__(self, folder: str | Path, write: bool = True):
        self.folder = Path(folder)
        self.plan: FilmPlan | None = None
        self.start: RecurrentState | None = None  # what the film continues from, see use_start
        self._lock = None
        if write:
            self._acquire()
        try:
            if (self.folder / PLAN).exists():
                self.plan = FilmPlan.from_json(self._read_plan())
        except StateError:
            self.close()
            raise

    def _read_plan(self) -> bytes:
        try:
            return (self.folder / PLAN).read_bytes()
        except OSError as error:
            raise disk_error(error, self.folder / PLAN, "read") from error

    def _acquire(self) -> None:
        import filelock

        if self.folder.exists() and not self.folder.is_dir():
            raise StateError("The run folder is not a folder", found=str(self.folder), action="Choose another name")
        try:
            SYSTEM.mkdir(self.folder)
            self._lock = filelock.FileLock(str(self.folder / LOCK), timeout=0)
            self._lock.acquire()
        except filelock.Timeout as error:
            self._lock = None
            raise StateError("The run folder is in use by another run", found=str(self.folder),
                             action="Wait until that run ends, or choose another run folder") from error
        except (OSError, NotImplementedError) as error:  # the latter: filelock on a file system without locks
            self._lock = None
            raise disk_error(error if isinstance(error, OSError) else OSError(str(error)), self.folder / LOCK) from error
        remove_orphans(self.folder)

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ plan

    def use_plan(self, plan: FilmPlan) -> int:
        """Make ``plan`` the film's plan and return how many blocks of it are already finished.

        A longer plan extends the film, a changed block is an edit: blocks before it are kept. Other settings start anew
        only through another folder, so that nothing finished is ever thrown away by a slip.
        """
        plan.check()
        if self.plan is not None and self.plan.settings != plan.settings:
            old, new = (vars(p.settings) for p in (self.plan, plan))
            field = next(name for name in new if old[name] != new[name])
            raise StateError(f"The run folder holds another film: {field} differs", found=old[field], expected=new[field],
                             action="Use the settings of that film, or choose another run folder")
        if self.plan is not None and plan.algorithm != self.plan.algorithm:
            plan = replace(plan, algorithm=self.plan.algorithm)
        if self.plan != plan:
            write_atomic(self.folder / PLAN, [plan.to_json()])
            self.plan = plan
        return self.finished()

    def use_start(self, state: RecurrentState | None) -> None:
        """Keep the state that the film continues from inside the folder (None: the film begins at nothing)."""
        self.start = state
        if state is not None and not (self.folder / START).exists():
            save_state(state.to("cpu"), self.folder / START)

    def start_state(self) -> RecurrentState | None:
        """The state before the film's first block."""
        if self.start is None and (self.folder / START).exists():
            self.start = load_state(self.folder / START)[0]
        return self.start

    def _planned(self) -> FilmPlan:
        if self.plan is None:
            raise StateError("The run folder holds no film", found=str(self.folder), action="Check the name of the run folder")
        return self.plan

    # ---------------------------------------------------------------------------------------------------------- blocks

    def block_path(self, block: int) -> Path:
        return self.folder / f"block_{block + 1:04d}.safetensors"

    def segment_path(self, block: int) -> Path:
        return self.folder / f"block_{block + 1:04d}.mp4"

    def finished(self) -> int:
        """How many blocks from the first on are on disk with the contract of the plan."""
        for block, contract in enumerate(self._planned().contracts):
            path = self.block_path(block)
            if not path.exists() or read_record(path, KIND).get("contract") != contract:
                return block
        return len(self.plan.blocks)

    def write_block(self, block: int, latent: Tensor, state: RecurrentState | None) -> None:
        """Store a finished block. ``state`` is the one after it; of its undo data only what the block before lacks is kept."""
        record = {"kind": KIND, "format": FORMAT, "block": block, "contract": self._planned().contracts[block], "state": None}
        tensors = {"latent": latent.detach().to("cpu", torch.float32)}
        if state is not None:
            state = self.kept(block, state).to("cpu")
            record["state"] = state_record(state)
            tensors |= state_tensors(state, _STATE)
        write_sealed(self.block_path(block), tensors, record)

    def kept(self, block: int, state: RecurrentState) -> RecurrentState:
        """What is stored of the state after a block: its undo data only where the text changes."""
        return state if self._planned().switches(block, self._start_caption()) else state._replace(undo=None)

    def _start_caption(self) -> str:
        start = self.start_state()
        return "" if start is None or not start.layers else start.caption

    def _check(self, block: int) -> Callable[[dict, Table], None]:
        def check(record: dict, table: Table) -> None:
            name = self.block_path(block).name
            if record.get("kind") != KIND or record.get("format") != FORMAT or record.get("block") != block:
                raise StateError(f"{name} is not that block of a film", found=record.get("kind"),
                                 action="Restore the file, or remove it to have the film sampled from there")
            if "latent" not in table or len(table["latent"][1]) != 5 or table["latent"][0] != torch.float32:
                raise StateError(f"{name} holds no latent", action="Remove it to have the film sampled from there")
            rest = {n: e for n, e in table.items() if n != "latent"}
            if record.get("state") is not None:
                check_layout(record["state"], rest, None, _STATE)
            elif rest:
                raise StateError(f"{name} holds tensors that its record does not know")

        return check

    def latent(self, block: int) -> Tensor:
        """The clean latent ``[1, C, T, H, W]`` of a block, in the model's space, verified."""
        _, tensors = read_sealed(self.block_path(block), KIND, MAX_BLOCK_BYTES, self._check(block), _STATE)
        return tensors["latent"]

    def has_state(self, block: int) -> bool:
        """True when the state after ``block`` is stored (-1: the state before the film)."""
        return block < 0 or read_record(self.block_path(block), KIND).get("state") is not None

    def can_continue(self, block: int) -> bool:
        """True when ``block`` can be sampled from what is stored: the state before it, able to take its last block back if
        the text changes there."""
        plan = self._planned()
        if block == 0 or not self.has_state(block - 1):
            return block == 0
        needs_undo = block < len(plan.blocks) and plan.switches(block)
        return not needs_undo or block == 1 or self.has_state(block - 2) or plan.switches(block - 1, self._start_caption())

    def state_after(self, block: int) -> RecurrentState | None:
        """The state after ``block``, able to take that block back when it once could; None before a film of its own."""
        if block < 0:
            return self.start_state()
        record, tensors = read_sealed(self.block_path(block), KIND, MAX_BLOCK_BYTES, self._check(block))
        if record["state"] is None:
            raise StateError(f"{self.block_path(block).name} holds no state", action="Sample the film from an earlier block")
        state = build_state(record["state"], tensors, _STATE)
        if state.undo is None and state.keep_undo and self.has_state(block - 1):
            before = self.state_after_plain(block - 1)
            layers, position = ((), self._planned().settings.position) if before is None else (before.layers, before.position)
            clean = tensors["latent"]
            state = state._replace(undo=Undo(layers, position, clean.repeat(state.batch // clean.shape[0], 1, 1, 1, 1)))
        return state

    def state_after_plain(self, block: int) -> RecurrentState | None:
        """As :meth:`state_after` but without undo data."""
        if block < 0:
            return self.start_state()
        record, tensors = read_sealed(self.block_path(block), KIND, MAX_BLOCK_BYTES, self._check(block))
        return build_state(record["state"], tensors, _STATE)._replace(undo=None)

    def drop_state(self, block: int) -> None:
        """Keep only the latent of a block: a state can be made again from the latents, see ``make.py``."""
        if 0 <= block and self.has_state(block):
            record, tensors = read_sealed(self.block_path(block), KIND, MAX_BLOCK_BYTES, self._check(block), _STATE)
            write_sealed(self.block_path(block), tensors, {**record, "state": None})

    def latents_before(self, block: int, count: int) -> Tensor | None:
        """The last ``count`` latent frames before ``block`` (fewer near the beginning), None before the first."""
        pieces: list[Tensor] = []
        while block > 0 and sum(p.shape[2] for p in pieces) < count:
            block -= 1
            pieces.insert(0, self.latent(block))
        start = self.start_state()
        if sum(p.shape[2] for p in pieces) < count and start is not None and start.undo is not None:
            pieces.insert(0, start.undo.latent[-1:].float())
        return torch.cat(pieces, 2)[:, :, -count:] if pieces else None

    # ------------------------------------------------------------------------------------------------------ operations

    def discard_from(self, block: int) -> None:
        """Remove the files of ``block`` and all after it, the last one first."""
        for path in sorted(self.folder.iterdir(), reverse=True):
            match = _BLOCK_FILE.fullmatch(path.name)
            if match and int(match[1]) > block:
                remove(path)

    def regenerate(self, block: int, seed: int | None = None) -> None:
        """Have the film sampled anew from ``block`` on; with a seed, with that seed for this block."""
        if seed is not None:
            self.use_plan(self._planned().edit(block, seed=seed))
        self._planned().edit(block)
        self.discard_from(block)

    def fork(self, folder: str | Path, block: int | None = None) -> None:
        """A second film in ``folder`` that shares the blocks before ``block`` (all finished ones when None).

        The files are never changed in place, so they can be shared between the folders (hard links) where the disk allows.
        """
        plan, done, target = self._planned(), self.finished(), Path(folder)
        count = done if block is None else block
        if not 0 < count <= done:
            raise SanaVideoError("The film cannot be forked there", found=f"block {count + 1}",
                                 expected=f"2 to {done + 1}: so many blocks are finished")
        if target.exists() and any(target.iterdir()):
            raise StateError("The folder of the fork is not empty", found=str(target), action="Choose another name")
        names = [START] if (self.folder / START).exists() else []
        names += [p.name for i in range(count) for p in (self.block_path(i), self.segment_path(i)) if p.exists()]
        with Film(target) as other:
            for name in names:
                _share(self.folder / name, other.folder / name)
            other.use_plan(replace(plan, blocks=plan.blocks[:count]))


def _share(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(source, part)
            SYSTEM.replace(part, target)
        except OSError as error:
            raise disk_error(error, target) from error
