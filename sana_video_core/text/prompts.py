"""From a prompt to the text that the encoder reads (model spec 3.2-3.4, vae/text spec 4.1). Not covered: tokens."""

from __future__ import annotations

import math

from ..errors import SanaVideoError

CAPTION_TOKENS = 300  # rows the network reads: position 0 and the last 299 of the padded sequence

# The instruction every public SANA-Video model was trained with, character for character (it is data, not prose of ours;
# Apache-2.0, SHA-256 62b9ab89...d634b1). The prompt follows its last line directly.
INSTRUCTION = "\n".join((
    'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for image '
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships "
    "to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully "
    "on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, "
    "a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or "
    "evaluations:",
    "User Prompt: ",
))

# The official script's default negative text (SHA-256 a38af16b...73d8d).
DEFAULT_NEGATIVE = (
    "A chaotic sequence with misshapen, deformed limbs in heavy motion blur, sudden disappearance, jump cuts, jerky "
    "movements, rapid shot changes, frames out of sync, inconsistent character shapes, temporal artifacts, jitter, and "
    "ghosting effects, creating a disorienting visual experience."
)


def motion_suffix(score: float | None) -> str:
    """`` motion score: N.`` for a score of 0 or more (whole part), nothing for None or a negative score."""
    if score is None:
        return ""
    if not math.isfinite(score):
        raise SanaVideoError("The motion score must be a number", found=score, expected="0 to 100, or -1 for none")
    return f" motion score: {int(score)}." if score >= 0 else ""


def positive_text(prompt: str, motion_score: float | None = 10, instruction: bool = True) -> str:
    """The whole text of a positive prompt; upper and lower case are kept, as the official code does."""
    return (INSTRUCTION if instruction else "") + prompt.strip() + motion_suffix(motion_score)


def negative_text(prompt: str) -> str:
    """The text of a negative prompt: no instruction, no motion score."""
    return prompt.strip()
