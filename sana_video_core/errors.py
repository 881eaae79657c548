"""Errors that an artist can act on: what was found, what was expected, what to do next."""

from __future__ import annotations


class SanaVideoError(ValueError):
    """A refusal with a readable reason. Everything the pack refuses on purpose raises this class.

    Parameters
    ----------
    what:     the refusal in one sentence.
    found:    what was found (optional).
    expected: what would have been right (optional).
    action:   what to do next (optional).
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, action: str | None = None):
        self.what, self.found, self.expected, self.action = what, found, expected, action
        parts = [what.rstrip(".") + "."]
        if found is not None:
            parts.append(f"Found: {found}.")
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if action:
            parts.append(action.rstrip(".") + ".")
        super().__init__(" ".join(parts))


class CheckpointError(SanaVideoError):
    """A model file that cannot be used: damaged, hostile, incomplete, or of another model."""


class StateError(SanaVideoError):
    """A recurrent state that does not fit the model, the video or this version."""
