"""What is learnt of videos while they are encoded, and how it gets to their prefill.

The methods of the model that encode are wrapped: what was learnt during a call is handed out as a
note on the encoder's output, one tuple of tensors (F, ...) per video. The next prefill takes it
from there, or, where the model encodes inside its forward, from what was found since that forward
began. So nothing can be left over from another prompt.
"""

from __future__ import annotations

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dycoke.errors import UnsupportedError
from dycoke.models import VideoSpan
from dycoke.patching import Patches
from dycoke.vision.wrap import KINDS

Note = tuple[Tensor, ...]
"""Of one video: tensors of the shape (F, ...)."""

NOTES = ("vision", "encoded")
"""The names that notes have on an encoder's output."""


class _Local(threading.local):
    """A thread's own: the call in progress, and what the forward in progress may use."""

    call: Any = None
    found: dict[str, list[Note]] | None = None
    handed: Any = None


class Notes(ABC):
    """Notes of one kind about a model's videos, from `install` on.

    Parameters
    ----------
    model : the model.
    kinds : what may hold frames, of "video" and "image".

    Attributes
    ----------
    NAME : of `NOTES`.
    WHAT : what the notes are, for errors.
    timed : entered around what the method costs beside the encoder's own work. Does nothing unless
        replaced.
    """

    NAME: ClassVar[str]
    WHAT: ClassVar[str]

    def __init__(self, model: Any, kinds: Sequence[str]) -> None:
        self.model, self.base, self.kinds = model, model.base_model, kinds
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        self._local = _Local()
        # An override is no help to a second thread while it calls on to the first one's function.
        self._turn = threading.RLock()

    @abstractmethod
    def begin(self, kind: str, inputs: dict[str, Any]) -> Any:
        """A batch of videos (images) is about to be encoded: what collects the notes."""

    @abstractmethod
    def finish(self, call: Any, kind: str, inputs: dict[str, Any], output: Any) -> list[Note]:
        """It was encoded: a note per video (image); [] where nothing was learnt."""

    def install(self, patches: Patches) -> None:
        """Wrap the methods that encode."""
        for kind in KINDS:
            name = f"get_{kind}_features"
            if hasattr(self.base, name):
                patches.replace(self.base, name, self._wrapped(kind, getattr(self.base, name)))
        if self.model is not self.base:
            patches.hook(self.model, self._begin)
        patches.hook(self.base, self._begin, self._end)

    def take(self, spans: Sequence[VideoSpan], device: torch.device | None) -> list[Note]:
        """The notes of this prefill's videos, on ``device``."""
        parts = {}
        for kind in KINDS:
            own = [span for span in spans if span.source == f"{kind}s"]
            parts[kind] = iter(self._matched(self._known(kind), own) if own else [])
        seen = [next(parts[span.source[:-1]]) for span in spans]
        return [tuple(tensor.to(device) for tensor in note) for note in seen]

    def _known(self, kind: str) -> Sequence[Note]:
        """What is known of the videos (images) that came with the forward in progress."""
        local = self._local
        if local.found and local.found[kind]:
            return local.found[kind]
        handed = local.handed if isinstance(local.handed, Mapping) else {}
        seen: Sequence[Note] = getattr(handed.get(kind), self.NAME, [])
        return seen

    # The forward that encodes, or gets what was encoded

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Seen at the outermost module: what moves inputs between devices copies them without it.
        if module is self.model or self._local.handed is None:
            self._local.handed = kwargs.get("mm_encoder_outputs")
        self._local.found = {kind: [] for kind in KINDS}

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.found = self._local.handed = None

    def _wrapped(self, kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(inner).parameters)

        @functools.wraps(inner)  # generate inspects its signature
        def encode(*args: Any, **kwargs: Any) -> Any:
            local = self._local
            with self._turn:
                if kind not in self.kinds or local.call is not None:
                    return inner(*args, **kwargs)
                inputs = dict(zip(names, args, strict=False)) | kwargs
                call = local.call = self.begin(kind, inputs)
                try:
                    output = inner(*args, **kwargs)
                finally:
                    local.call = None
            if hasattr(output, "pooler_output"):
                with self.timed():
                    notes = self.finish(call, kind, inputs, output)
                if notes:
                    setattr(output, self.NAME, notes)
                    if local.found is not None:
                        local.found[kind] += notes
            return output

        return encode

    def _matched(self, encoded: Sequence[Note], spans: Sequence[VideoSpan]) -> list[Note]:
        """Give each span what is known of its frames.

        Beams and several answers repeat a sample, but not what was encoded for it before.
        """
        frames = sum(len(note[0]) for note in encoded)
        if not frames:
            raise UnsupportedError(
                f"the method needs {self.WHAT}, and the features came without it: pass the pixels, "
                "or encode with the model's get_video_features (get_image_features) inside the "
                f"block; its output carries them as .{self.NAME}"
            )
        repeats = max(1, sum(len(span.positions) for span in spans) // frames)
        firsts = [span for span in spans if span.sample % repeats == 0]
        known: dict[int, list[Note]] = {}
        given = [note[0].shape[1] for note in encoded for _ in note[0]]
        wanted = [span.positions.shape[1] for span in firsts for _ in span.positions]
        if given != wanted:
            raise UnsupportedError(
                f"the prompt has {len(wanted)} frames of {sorted(set(wanted))} tokens, and "
                f".{self.NAME} is of {len(given)} frames of {sorted(set(given))}; hand over what "
                "was encoded for this prompt, inside the block"
            )
        parts = regroup(encoded, [len(span.positions) for span in firsts])
        for span, seen in zip(firsts, parts, strict=True):
            known.setdefault(span.sample, []).append(seen)
        left = {span.sample: iter(known[span.sample - span.sample % repeats]) for span in spans}
        return [next(left[span.sample]) for span in spans]


def regroup(notes: Sequence[Note], frames: Sequence[int]) -> list[Note]:
    """Cut what is known of frames anew: ``frames[i]`` for video i, in order."""
    columns = [[frame for part in column for frame in part] for column in zip(*notes, strict=True)]
    videos, start = [], 0
    for count in frames:
        videos.append(tuple(torch.stack(c[start : start + count]) for c in columns))
        start += count
    return videos
