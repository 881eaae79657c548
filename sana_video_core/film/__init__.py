"""Films: long videos in a run folder, block by block, resumable and editable, with a video file that grows."""

from .folder import Film
from .make import make_film
from .plan import FilmBlock, FilmPlan, FilmSettings
from .video import Decoder, FilmVideo, WanStream

__all__ = ["Decoder", "Film", "FilmBlock", "FilmPlan", "FilmSettings", "FilmVideo", "WanStream", "make_film"]
