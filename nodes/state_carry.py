"""STATE on its way: go on, fork a film, go back to a block of a run folder, take a block back, shorten the memory."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, choice, whole_number
from .long import State, require_state, summary
from .shared_state import hand_out

ACTIONS = ["carry", "fork", "rewind", "undo", "window"]


class SanaVideoKVStateCarry(io.ComfyNode):
    """One node for what happens between two block samplers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoKVStateCarry",
            display_name="SANA-Video Carry State",
            category=CATEGORY,
            description="Hands a state on to the next block sampler, and can go back to an earlier block, take the last block "
                        "back, fork a film or shorten what the state remembers. Shows what is inside.",
            search_aliases=["kv cache", "state", "fork", "rewind", "continue", "undo", "window"],
            inputs=[
                State.Input("state", optional=True, tooltip="From a block sampler. Not needed for rewind and fork, which read "
                                                            "the "
                                                            "run folder."),
                io.Combo.Input("action", options=ACTIONS, default=ACTIONS[0],
                               tooltip="carry: as it is. rewind: the state after a block of the run folder. fork: the same, "
                                       "and a "
                                       "second run folder with the blocks up to there. undo: before the last block. window: "
                                       "remember only the last blocks from here on."),
                io.String.Input("name", default="", tooltip="carry: a label for the summary. fork: the name of the new run "
                                                            "folder."),
                io.String.Input("run_folder", default="", tooltip="The run folder for rewind and fork."),
                io.Int.Input("block", default=1, min=1, max=10_000,
                             tooltip="rewind and fork: the last block to keep, counted from 1. window: how many blocks to "
                                     "remember."),
            ],
            outputs=[
                State.Output(display_name="state", tooltip="To the state input of a block sampler."),
                io.String.Output(display_name="summary", tooltip="What the state holds: blocks, seconds, size."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, action=None, run_folder=None, **others):
        """Runs again when the film in the run folder has changed."""
        if action not in ("rewind", "fork") or not isinstance(run_folder, str) or not run_folder.strip():
            return ""
        from .film import film_stamp

        return film_stamp(run_folder)

    @classmethod
    def execute(cls, action, name, run_folder, block, state=None) -> io.NodeOutput:
        choice("action", action, ACTIONS)
        block = whole_number("block", block, 1, 10_000)
        if action in ("rewind", "fork"):
            after = from_folder(run_folder, block, name if action == "fork" else None)
        elif action == "undo":
            after = require_state(state).before_last()[0]
        elif action == "window":
            after = require_state(state).windowed(block)
        else:
            require_state(state)
            after = state
        label = f"{name.strip()}: " if isinstance(name, str) and name.strip() else ""
        return io.NodeOutput(hand_out(after), label + summary(after))


def from_folder(name: str, block: int, fork: str | None):
    """The state after ``block`` (from 1) of a run folder; with ``fork`` a second folder of that name shares what is before."""
    from ..sana_video_core.film import Film
    from .film import run_folder

    with Film(run_folder(name, True), write=False) as film:
        done = film.finished()
        if block > done:
            raise SanaVideoError("The film is not that long yet", found=f"block {block}", expected=f"1 to {done}",
                                 action="Let the block sampler finish it first")
        if not film.has_state(block - 1):
            raise SanaVideoError(f"The state after block {block} was not kept", found=name,
                                 action="Make the film with 'keep_states' on, or change the prompt or seed of a block in the "
                                        "block "
                                        "sampler: it goes back by itself")
        if fork is not None:
            target = run_folder(fork)
            if target == run_folder(name):
                raise SanaVideoError("A fork needs a name of its own", found=fork, action="Choose another name")
            if not (target / "film.json").exists():
                film.fork(target, block)
        return film.state_after(block - 1)
