"""States as files, to go on with a video another day."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, spec_of
from .long import State, model_print, require_state, summary
from .shared_state import hand_out

log = logging.getLogger(__name__)

FOLDER = "sana_video_states"
NOTHING = "no state saved yet"


def states_root() -> Path:
    """Where state files lie."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / FOLDER


def saved_states() -> list[str]:
    """Names of the saved states, newest first."""
    root = states_root()
    found = [p for p in root.rglob("*.safetensors") if not p.name.startswith(".")] if root.is_dir() else []
    return [p.relative_to(root).as_posix() for p in sorted(found, key=lambda p: -p.stat().st_mtime_ns)]


class SanaVideoStateSave(io.ComfyNode):
    """STATE to a safetensors file with a checksum over every byte."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoStateSave",
            display_name="SANA-Video Save State",
            category=CATEGORY,
            description="Writes the state to output/sana_video_states, whole or not at all. Load it any day to go on exactly "
                        "there.",
            search_aliases=["save state", "kv cache", "checkpoint", "continue later"],
            inputs=[
                State.Input("state", tooltip="From a block sampler."),
                io.String.Input("name", default="state", tooltip="Name of the file; a number is added. 'series/night' makes a "
                                                                 "folder."),
            ],
            outputs=[State.Output(display_name="state", tooltip="The same state."),
                     io.String.Output(display_name="file", tooltip="The file's name, as 'SANA-Video Load State' lists it.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, state, name) -> io.NodeOutput:
        from .film import safe_path

        plain = require_state(state)
        base = safe_path(name, states_root(), "state")
        number = 1
        while (path := base.with_name(f"{base.name}_{number:05d}.safetensors")).exists():
            number += 1
        plain.to("cpu").save(path)
        relative = path.relative_to(states_root()).as_posix()
        log.info("Saved %s: %s", relative, summary(state))
        return io.NodeOutput(hand_out(state), relative, ui=ui.PreviewText(f"{relative}\n{summary(state)}"))


class SanaVideoStateLoad(io.ComfyNode):
    """A saved STATE, refused unless every byte is as it was written."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoStateLoad",
            display_name="SANA-Video Load State",
            category=CATEGORY,
            description="Reads a state from output/sana_video_states. A damaged file, or one of another model, is refused.",
            search_aliases=["load state", "kv cache", "resume", "continue"],
            inputs=[
                io.Combo.Input("file", options=saved_states() or [NOTHING], tooltip="The saved state, newest first."),
                io.Model.Input("model", optional=True, tooltip="Checks at once that the state belongs to this model. The block "
                                                               "sampler checks it too."),
            ],
            outputs=[State.Output(display_name="state", tooltip="To the state input of a block sampler."),
                     io.String.Output(display_name="summary", tooltip="What the state holds: blocks, seconds, size.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file=None, model=None):
        """Loads again when the file was replaced."""
        path = states_root() / str(file)
        if file not in saved_states():
            return ""
        return f"{path.stat().st_size}-{path.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, file, model=None) -> io.NodeOutput:
        from ..sana_video_core.state import RecurrentState, check_fits

        known = saved_states()
        if file not in known:
            raise SanaVideoError("There is no such saved state", found=str(file)[:80],
                                 expected=", ".join(known[:8]) or "none yet",
                                 action="Save one with 'SANA-Video Save State', then reload the node list (R)")
        spec = None if model is None else spec_of(model)
        state = RecurrentState.load(states_root() / file, spec)
        if model is not None:
            check_fits(state, spec, state.grid, state.batch, None, model_print(model))
        return io.NodeOutput(hand_out(state), summary(state))
