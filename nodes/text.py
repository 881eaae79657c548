"""Prompts to CONDITIONING: the official instruction, the motion score and the plain negative prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from ..sana_video_core.text.prompts import DEFAULT_NEGATIVE, INSTRUCTION, motion_suffix
from .common import CATEGORY, require_part, whole_number

MAX_MOTION = 100


class SanaVideoTextEncode(io.ComfyNode):
    """Both prompts in one node, because they are encoded in different ways (model spec 3.2-3.4)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoTextEncode",
            display_name="SANA-Video Text Encode",
            category=CATEGORY,
            description="Turns a prompt and a negative prompt into conditioning, the way SANA-Video was trained.",
            search_aliases=["prompt", "motion score", "gemma", "conditioning", "negative prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder: CLIP of 'Load SANA-Video', or 'Load CLIP' of type pixeldit."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, placeholder="What the video shows",
                                tooltip="What the video shows. One to five full sentences work best: subject, place, light, "
                                        "camera, movement."),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default=DEFAULT_NEGATIVE,
                                placeholder="What to avoid (may stay empty)",
                                tooltip="What to steer away from. Used when CFG is above 1; may stay empty."),
                io.Int.Input("motion_score", default=10, min=-1, max=MAX_MOTION,
                             tooltip="How much moves: about 5 is calm, 10 normal, 30 lively. -1 leaves the score out."),
                io.Boolean.Input("instruction", default=True,
                                 tooltip="Puts the instruction that the model was trained with before the prompt. Off: the "
                                         "picture follows the bare words, usually with less detail."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="To the sampler's positive input."),
                io.Conditioning.Output(display_name="negative", tooltip="To the sampler's negative input."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_prompt, motion_score, instruction) -> io.NodeOutput:
        require_part(clip, "CLIP", "Choose a text encoder in 'Load SANA-Video', or connect 'Load CLIP' (type pixeldit)")
        from .native_text import require_gemma_clip

        require_gemma_clip(clip)
        score = whole_number("motion_score", motion_score, -1, MAX_MOTION)
        if not isinstance(prompt, str) or not prompt.strip():
            raise SanaVideoError("The prompt is empty", action="Write what the video shows into the prompt field")
        uses = bool(instruction) and getattr(clip.tokenizer, "uses_instruction", True)
        positive = encode(clip, prompt.strip() + motion_suffix(score), INSTRUCTION if uses else "", "prompt")
        return io.NodeOutput(positive, encode(clip, str(negative_prompt or "").strip(), "", "negative prompt"))


def encode(clip, text: str, instruction: str, name: str):
    """CONDITIONING of one text; refuses a text of which the model would read only the beginning."""
    from .native_text import token_rows

    rows, rest = token_rows(clip.tokenizer, text, instruction)
    if rest:
        kept = len(text) - len(rest.strip())
        raise SanaVideoError(f"The {name} is too long: the model reads 300 tokens",
                             found=f"{len(text)} characters, of which about the first {kept} fit",
                             action=f"Shorten it; what no longer fits begins with '{rest.strip()[:40]}'")
    return clip.encode_from_tokens_scheduled(rows)
