"""Prompts over time for the block sampler, written as text."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from ..sana_video_core.sampling.schedule_text import parse_schedule, scores_of
from ..sana_video_core.text.prompts import INSTRUCTION, motion_suffix
from .common import CATEGORY, require_part, whole_number
from .long import MARK
from .text import MAX_MOTION, encode

MAX_CUES = 400  # texts to encode: a motion curve needs one for each whole score it passes
EXAMPLE = """[0-5s] a red fox runs through fresh snow; motion 20
[5-10s] the fox stops and looks up at the sky; motion 20 -> 5
[10s-] snow begins to fall on the fox; motion 5"""


class SanaVideoPromptSchedule(io.ComfyNode):
    """Text to one CONDITIONING whose entries carry their times."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoPromptSchedule",
            display_name="SANA-Video Prompt Schedule",
            category=CATEGORY,
            description="What the video shows when: one line a part, in seconds or by blocks, with motion scores that may glide.",
            search_aliases=["prompt travel", "schedule", "timeline", "storyboard", "motion curve"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder: CLIP of 'Load SANA-Video', or 'Load CLIP' of type pixeldit."),
                io.String.Input("text", multiline=True, dynamic_prompts=False, default=EXAMPLE,
                                tooltip="[0-5s] or [block 1-2], then the prompt, then '; motion 20' or '; motion 20 -> 5', '; "
                                        "seed "
                                        "7'. Times count from the beginning of the whole video, also when you go on from a "
                                        "state. "
                                        "# begins a comment."),
                io.Int.Input("motion_score", default=10, min=-1, max=MAX_MOTION,
                             tooltip="For parts that name none. About 5 is calm, 10 normal, 30 lively. -1 leaves the score out."),
                io.Boolean.Input("instruction", default=True,
                                 tooltip="Puts the instruction that the model was trained with before every prompt."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="To the positive input of 'SANA-Video Block Sampler' "
                                                                        "only."),
                io.String.Output(display_name="summary", tooltip="The parts as they were understood."),
            ],
        )

    @classmethod
    def execute(cls, clip, text, motion_score, instruction) -> io.NodeOutput:
        require_part(clip, "CLIP", "Choose a text encoder in 'Load SANA-Video', or connect 'Load CLIP' (type pixeldit)")
        from .native_text import require_gemma_clip

        default = whole_number("motion_score", motion_score, -1, MAX_MOTION)
        parts = parse_schedule(text)
        scores = [scores_of(part, default) for part in parts]
        count = sum(len(s) for s in scores)
        if count > MAX_CUES:
            raise SanaVideoError("The schedule asks for too many texts", found=f"{count} prompts and motion scores",
                                 expected=f"at most {MAX_CUES}", action="Use fewer parts or shorter motion curves")
        require_gemma_clip(clip)
        uses = bool(instruction) and getattr(clip.tokenizer, "uses_instruction", True)
        done: dict[tuple[str, int], tuple] = {}
        entries = []
        for index, part in enumerate(parts):
            for score in scores[index]:
                if (part.prompt, score) not in done:
                    words = part.prompt + motion_suffix(score)
                    done[part.prompt, score] = encode(clip, words, INSTRUCTION if uses else "", f"prompt of line {part.line}")[0]
                embedding, options = done[part.prompt, score]
                entries.append([embedding, {**options, MARK: {"parts": parts, "part": index, "score": score}}])
        return io.NodeOutput(entries, "\n".join(_describe(part, s) for part, s in zip(parts, scores)))


def _describe(part, scores: tuple[int, ...]) -> str:
    """One line such as '0-5s: a fox (motion 20 to 5)'."""
    if part.unit == "block":
        first, last = int(part.start) + 1, "" if part.end == float("inf") else int(part.end)
        when = f"block {first}" if last == first else f"block {first}-{last}"
    else:
        when = f"{part.start:g}-{'' if part.end == float('inf') else f'{part.end:g}'}s"
    motion = "no motion score" if scores[0] < 0 else f"motion {scores[0]}" + (f" to {scores[-1]}" if len(scores) > 1 else "")
    seed = "" if part.seed is None else f", seed {part.seed}"
    return f"{when}: {part.prompt} ({motion}{seed})"
