"""A clip that is read while something else goes on, such as loading a model."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dycoke.cli.console import BadInput, err
from dycoke.cli.options import MAX_PIXELS

if TYPE_CHECKING:
    from dycoke.video import Video


class ReadingClip:
    """Frames of a file, decoded in a thread of their own inside the block.

    The block is entered once the first frame is there, so that a file that is no video is refused
    before anything else takes minutes. Where the block is left early, decoding stops.

    Parameters
    ----------
    path, frames, stream, max_pixels : as in `dycoke.video.read`.
    """

    def __init__(
        self, path: Path, frames: int, stream: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._path, self._how = path, (frames, self._progress, stream, max_pixels)
        self._started, self._left = threading.Event(), False
        self._video: Video | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._status = "decoding frames"
        self._thread = threading.Thread(target=self._read, name="decoding")

    def __enter__(self) -> ReadingClip:
        import dycoke.video  # noqa: F401  (here, as an error of an import is no error of the file)

        self._thread.start()
        try:
            with err.status(self._status):
                self._started.wait()
            self._check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._thread.join()

    def video(self) -> tuple[Video, float]:
        """The clip, once all of it is there, and the seconds that its thread took.

        Raises
        ------
        BadInput
            Where the file breaks off.
        """
        with err.status(self._status) as status:
            while self._thread.is_alive():
                status.update(self._status)
                self._thread.join(0.1)
        self._check()
        assert self._video is not None
        for note in self._video.notes:
            err.print(f"note: {self._path}: {note}", soft_wrap=True, markup=False)
        return self._video, self._seconds

    def _read(self) -> None:
        from dycoke.video import read

        began = time.perf_counter()
        try:
            self._video = read(self._path, *self._how)
        except BaseException as error:  # for the thread that asks for the clip
            self._error = error
        self._seconds = time.perf_counter() - began
        self._started.set()

    def _progress(self, done: int, of: int) -> None:
        if self._left:
            raise _LeftError
        self._status = f"decoding frames: {done}/{of}"
        self._started.set()

    def _check(self) -> None:
        from dycoke.video import VideoError

        if isinstance(self._error, VideoError):
            raise BadInput(str(self._error)) from None
        if self._error is not None:
            raise self._error


class _LeftError(Exception):
    """Nobody waits for the frames any more."""
