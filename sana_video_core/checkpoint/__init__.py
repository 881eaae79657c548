"""Model files: containers, strict checks, the key table, detection, loading and saving."""

from .convert import convert, validate
from .detect import as_mode, detect_spec, spec_from_text, spec_to_text
from .load import load_transformer, load_weights
from .save import save_transformer
from .source import SPEC_KEY, Source, read_state_dict

__all__ = ["SPEC_KEY", "Source", "as_mode", "convert", "detect_spec", "load_transformer", "load_weights", "read_state_dict",
           "save_transformer", "spec_from_text", "spec_to_text", "validate"]
