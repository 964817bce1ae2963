"""What the vision encoder's attention says of each video token, for methods that ask for it.

One attention module of the encoder is overridden, that of the last layer that the features come
from, and the methods of the model that encode are wrapped: what the module saw during a call is
pooled to tokens and handed out as ``output.vision``, one (scores (F, N), keys (F, N, C)) per video.
The next prefill takes it from there, or, where the model encodes inside its forward, from what was
found since that forward began. So nothing can be left over from another prompt.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from dycoke.attention import Override
from dycoke.core.method import EncoderAttention
from dycoke.errors import UnsupportedError
from dycoke.models import Family, VideoSpan, families
from dycoke.patching import Patches
from dycoke.vision.chunks import regroup
from dycoke.vision.wrap import KINDS

BLOCK = 1 << 24  # attention weights that `received` holds at once: 64 MB in float32


class _Call:
    """What the encoder's attention saw while one batch of videos (images) was encoded.

    Attributes
    ----------
    packed : whether all patches come as one list, cut by grids; else frames come side by side.
    scores : per call of the attention module, (frames, P): attention that each patch received. Of
        packed patches the sum over queries, else the mean.
    keys : likewise (frames, P, C), a mean over heads.
    """

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        self.scores: list[Tensor] = []
        self.keys: list[Tensor] = []

    @torch.no_grad()
    def add(
        self, query: Tensor, keys: Tensor, scaling: float | None, hidden: Tensor | None
    ) -> None:
        """One call of the attention module; query and keys of shape (frames, H, P, C)."""
        length = query.shape[2]
        # A square of patches and one more: the class token, whose attention says what matters.
        first = int(not self.packed and isqrt(length - 1) ** 2 == length - 1)
        query = query[:, :, :1] if first else query
        scores = received(query, keys, scaling, hidden)[:, first:]
        self.scores.append(scores if self.packed else scores / query.shape[2])
        self.keys.append(keys.to(scores.dtype).mean(1)[:, first:])


class _Local(threading.local):
    """A thread's own: the call in progress, and what the forward in progress may use."""

    call: _Call | None = None
    found: dict[str, list[EncoderAttention]] | None = None
    handed: Any = None


class Vision:
    """Scores and keys of a model's video tokens, from `install` on.

    Parameters
    ----------
    model : the model.
    family : its family; None where the user's own layout finds the videos.
    kinds : what may hold frames, of "video" and "image".

    Attributes
    ----------
    timed : entered around what the method costs beside the encoder's own work: taking scores and
        keys of its attention, and pooling them to tokens. Does nothing unless replaced.

    Raises
    ------
    UnsupportedError
        Where the family does not say where its encoder's attention is.
    """

    def __init__(self, model: Any, family: Family | None, kinds: Sequence[str]) -> None:
        self.model, self.base = model, model.base_model
        self.family, self.kinds = family, kinds
        self.module = _attention(self.base, family)
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext
        self._local = _Local()
        # An override is no help to a second thread while it calls on to the first one's function.
        self._turn = threading.RLock()

    def install(self, patches: Patches) -> None:
        """Override the attention module and wrap the methods that encode."""
        Override(patches, self.module, self._attend)
        for kind in KINDS:
            name = f"get_{kind}_features"
            if hasattr(self.base, name):
                patches.replace(self.base, name, self._wrapped(kind, getattr(self.base, name)))
        if self.model is not self.base:
            patches.hook(self.model, self._begin)
        patches.hook(self.base, self._begin, self._end)

    def take(self, spans: Sequence[VideoSpan], device: torch.device) -> list[EncoderAttention]:
        """Scores and keys of this prefill's videos, on ``device``."""
        parts = {}
        for kind in KINDS:
            own = [span for span in spans if span.source == f"{kind}s"]
            parts[kind] = iter(_matched(self._encoded(kind), own) if own else [])
        seen = [next(parts[span.source[:-1]]) for span in spans]
        return [(scores.to(device), keys.to(device)) for scores, keys in seen]

    def _encoded(self, kind: str) -> Sequence[EncoderAttention]:
        """What is known of the videos (images) that came with the forward in progress."""
        local = self._local
        if local.found and local.found[kind]:
            return local.found[kind]
        handed = local.handed if isinstance(local.handed, Mapping) else {}
        seen: Sequence[EncoderAttention] = getattr(handed.get(kind), "vision", [])
        return seen

    # The forward that encodes, or gets what was encoded

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Seen at the outermost module: what moves inputs between devices copies them without it.
        if module is self.model or self._local.handed is None:
            self._local.handed = kwargs.get("mm_encoder_outputs")
        self._local.found = {kind: [] for kind in KINDS}

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._local.found = self._local.handed = None

    # The encoder

    def _attend(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        output = inner(module, *args, **kwargs)
        if self._local.call is not None:
            with self.timed():
                self.note(args, kwargs)
        return output

    def note(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Take in a call of the attention module."""
        call, query, keys = self._local.call, args[0], args[1]
        assert call is not None
        mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
        starts = kwargs.get("cu_seq_lens_q")  # FlashAttention takes all slices at once
        lengths = [query.shape[2]] if starts is None else starts.diff().tolist()
        for q, k in zip(query.split(lengths, 2), keys.split(lengths, 2), strict=True):
            call.add(q, k, kwargs.get("scaling"), _hidden(mask))

    def pool(
        self, call: _Call, kind: str, inputs: dict[str, Any], output: Any
    ) -> list[EncoderAttention]:
        """From patches to the tokens of each video (image)."""
        pool = self._packed if call.packed else self._stacked
        return pool(call, kind, inputs, output)

    def _wrapped(self, kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(inner).parameters)

        @functools.wraps(inner)  # generate inspects its signature
        def encode(*args: Any, **kwargs: Any) -> Any:
            local = self._local
            with self._turn:
                if kind not in self.kinds or local.call is not None:
                    return inner(*args, **kwargs)
                inputs = dict(zip(names, args, strict=False)) | kwargs
                self._check_layer(inputs.get("vision_feature_layer"))
                call = local.call = _Call(f"{kind}_grid_thw" in inputs)
                try:
                    output = inner(*args, **kwargs)
                finally:
                    local.call = None
            if call.scores and hasattr(output, "pooler_output"):
                with self.timed():
                    output.vision = self.pool(call, kind, inputs, output)
                if local.found is not None:
                    local.found[kind] += output.vision
            return output

        return encode

    def _check_layer(self, asked: Any) -> None:
        ours = getattr(self.base.config, "vision_feature_layer", None)
        if asked is not None and asked != ours:
            raise UnsupportedError(
                f"vision_feature_layer={asked} was asked for, and the attention of the config's "
                f"{ours} is what the method gets; set it in the config before the block"
            )

    def _stacked(
        self, call: _Call, kind: str, inputs: dict[str, Any], output: Any
    ) -> list[EncoderAttention]:
        """Frames side by side, a square of patches each, pooled to a square of tokens."""
        scores, keys = torch.cat(call.scores), torch.cat(call.keys)
        rows = sum(video.shape[:-1].numel() for video in output.pooler_output)
        side = isqrt(rows // len(scores))  # one token may close a video
        videos = [1] * len(scores)
        if kind == "video":
            pixels = next(v for n, v in inputs.items() if n.startswith("pixel_values"))
            videos = [pixels.shape[1]] * pixels.shape[0]
        return regroup([(pooled(scores[..., None], side)[..., 0], pooled(keys, side))], videos)

    def _packed(
        self, call: _Call, kind: str, inputs: dict[str, Any], output: Any
    ) -> list[EncoderAttention]:
        """Patches of all videos in one row, those of a token one after another."""
        grids = inputs[f"{kind}_grid_thw"]
        config = self.base.config.vision_config
        merges = inputs.get(f"{kind}_merge_sizes")
        merges = [config.spatial_merge_size] * len(grids) if merges is None else merges.tolist()
        order = None if self.family is None else self.family.encoder_order
        every_score = torch.cat(call.scores, 1)[0]
        every_key = torch.cat(call.keys, 1)[0]
        videos, start = [], 0
        for (slices, height, width), merge in zip(grids.tolist(), merges, strict=True):
            own = slice(start, start + slices * height * width)
            start = own.stop
            # As many queries as patches; a token's score is the mean over its patches.
            scores = every_score[own].view(-1, merge**2).mean(1) / (height * width)
            keys = every_key[own].view(len(scores), merge**2, -1).mean(1)
            if order is not None:
                back = order(config, (slices, height // merge, width // merge)).argsort()
                scores, keys = (x[back.to(x.device)] for x in (scores, keys))
            scores = scores.view(slices, -1)
            videos.append((scores, keys.view(*scores.shape, -1)))
        return videos


def _attention(base: Any, family: Family | None) -> nn.Module:
    """The attention module of the last layer that the features come from."""
    path = None if family is None else family.vision_attention
    if path is None:
        whose = "a layout of your own" if family is None else base.config.model_type
        known = sorted(name for name, known in families().items() if known.vision_attention)
        raise UnsupportedError(
            "the method needs the vision encoder's attention, and where that is, is not known for "
            f"{whose}; it is for {', '.join(known)}; there without layout=, or use a method that "
            "does without"
        )
    layers, name = path.split(".*.")
    asked = getattr(base.config, "vision_feature_layer", -1)
    try:
        count = len(base.get_submodule(layers))
        # hidden_states[0] goes into layer 0, and hidden_states[-1] comes out of the last one.
        states = [asked] if isinstance(asked, int) else asked
        layer = max(i if i >= 0 else count + 1 + i for i in states) - 1
        module: nn.Module = base.get_submodule(f"{layers}.{layer}.{name}")
    except AttributeError as error:
        raise UnsupportedError(
            f"the method needs the vision encoder's attention, and {path} of vision_feature_layer="
            f"{asked} is not in {type(base).__name__}: {error}; use a method that does without"
        ) from None
    return module


def _matched(
    encoded: Sequence[EncoderAttention], spans: Sequence[VideoSpan]
) -> list[EncoderAttention]:
    """Give each span what is known of its frames.

    Beams and several answers repeat a sample, but not what was encoded for it before.
    """
    frames = sum(len(scores) for scores, _ in encoded)
    if not frames:
        raise UnsupportedError(
            "the method needs the vision encoder's attention, and the features came without it: "
            "pass the pixels, or encode with the model's get_video_features (get_image_features) "
            "inside the block; its output carries them as .vision"
        )
    repeats = max(1, sum(len(span.positions) for span in spans) // frames)
    firsts = [span for span in spans if span.sample % repeats == 0]
    known: dict[int, list[EncoderAttention]] = {}
    given = [scores.shape[1] for scores, _ in encoded for _ in scores]
    wanted = [span.positions.shape[1] for span in firsts for _ in span.positions]
    if given != wanted:
        raise UnsupportedError(
            f"the prompt has {len(wanted)} frames of {sorted(set(wanted))} tokens, and .vision is "
            f"of {len(given)} frames of {sorted(set(given))}; hand over what was encoded for this "
            "prompt, inside the block"
        )
    parts = regroup(encoded, [len(span.positions) for span in firsts])
    for span, seen in zip(firsts, parts, strict=True):
        known.setdefault(span.sample, []).append(seen)
    left = {span.sample: iter(known[span.sample - span.sample % repeats]) for span in spans}
    return [next(left[span.sample]) for span in spans]


def _hidden(mask: Tensor | None) -> Tensor | None:
    """The keys that an attention mask of any backend hides from all queries: (B, 1, 1, K)."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return ~mask.bool()[:, None, None]
    mask = mask[:, :1, :1]
    return ~mask if mask.dtype == torch.bool else mask < 0


def pooled(values: Tensor, side: int) -> Tensor:
    """A square of patches, (F, P, C), to a square of tokens, (F, side * side, C).

    Means of blocks where the patches divide evenly, else bilinear, as LLaVA-OneVision pools.
    """
    frames, patches, width = values.shape
    before = isqrt(patches)
    grid = values.transpose(1, 2).reshape(frames, width, before, before)
    if before % side == 0:
        grid = adaptive_avg_pool2d(grid, side)
    else:
        grid = interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def received(
    query: Tensor, keys: Tensor, scaling: float | None, hidden: Tensor | None = None
) -> Tensor:
    """Attention that each key gets: summed over queries, a mean over heads.

    Parameters
    ----------
    query : Tensor, shape (B, H, Q, C)
    keys : Tensor, shape (B, H, K, C)
    scaling : float or None
        1 / sqrt(C) where None.
    hidden : Tensor, bool, shape (B, 1, 1, K), or None
        Keys that nobody sees.

    Returns
    -------
    Tensor, shape (B, K)
        float32, or float64 for float64 inputs. At most `BLOCK` weights are held at once.
    """
    batch, heads, queries, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = query.new_zeros(batch, keys.shape[2], dtype=dtype)
    rows = max(1, BLOCK // (heads * keys.shape[2]))
    frames = max(1, rows // queries)
    for start in range(0, batch, frames):
        part = slice(start, start + frames)
        key = keys[part].to(dtype).transpose(2, 3)
        for first in range(0, queries, rows):
            logits = (query[part, :, first : first + rows].to(dtype) * scaling) @ key
            if hidden is not None:
                logits = logits.masked_fill(hidden[part], -torch.inf)
            total[part] += logits.softmax(-1).sum((1, 2))
    return total / heads
