"""A file -> sampled frames; every bad input is one clear line."""

from dycoke.video.opening import VideoError
from dycoke.video.reading import MAX_PIXELS, Video, read, sample_indices

__all__ = ["MAX_PIXELS", "Video", "VideoError", "read", "sample_indices"]
