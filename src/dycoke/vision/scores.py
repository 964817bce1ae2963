"""What the vision encoder's attention says of each video token, for methods that ask for it.

One attention module of the encoder is overridden, that of the last layer that the features come
from. What it saw during a call is pooled to tokens and handed out as ``output.vision``, one
(scores (F, N), keys (F, N, C)) per video; see `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from dycoke.attention import Override
from dycoke.errors import UnsupportedError
from dycoke.models import Family, families
from dycoke.patching import Patches
from dycoke.vision.notes import Note, Notes, regroup

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


class Vision(Notes):
    """Scores and keys of a model's video tokens, from `install` on.

    Parameters
    ----------
    model : the model.
    family : its family; None where the user's own layout finds the videos.
    kinds : what may hold frames, of "video" and "image".

    Raises
    ------
    UnsupportedError
        Where the family does not say where its encoder's attention is.
    """

    NAME = "vision"
    WHAT = "the vision encoder's attention"

    def __init__(self, model: Any, family: Family | None, kinds: Sequence[str]) -> None:
        super().__init__(model, kinds)
        self.family = family
        _, self.module = encoder_attention(self.base, family, self.WHAT)

    def install(self, patches: Patches) -> None:
        """Override the attention module and wrap the methods that encode."""
        Override(patches, self.module, self._attend)
        super().install(patches)

    def begin(self, kind: str, inputs: dict[str, Any]) -> _Call:
        check_feature_layer(self.base, inputs)
        return _Call(f"{kind}_grid_thw" in inputs)

    def finish(self, call: _Call, kind: str, inputs: dict[str, Any], output: Any) -> list[Note]:
        return self.pool(call, kind, inputs, output) if call.scores else []

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
        mask = args[3]
        starts = kwargs.get("cu_seq_lens_q")  # FlashAttention takes all slices at once
        lengths = [query.shape[2]] if starts is None else starts.diff().tolist()
        for q, k in zip(query.split(lengths, 2), keys.split(lengths, 2), strict=True):
            call.add(q, k, kwargs.get("scaling"), _hidden(mask))

    def pool(self, call: _Call, kind: str, inputs: dict[str, Any], output: Any) -> list[Note]:
        """From patches to the tokens of each video (image)."""
        pool = self._packed if call.packed else self._stacked
        return pool(call, kind, inputs, output)

    def _stacked(self, call: _Call, kind: str, inputs: dict[str, Any], output: Any) -> list[Note]:
        """Frames side by side, a square of patches each, pooled to a square of tokens."""
        scores, keys = torch.cat(call.scores), torch.cat(call.keys)
        rows = sum(video.shape[:-1].numel() for video in output.pooler_output)
        side = isqrt(rows // len(scores))  # one token may close a video
        videos = [1] * len(scores)
        if kind == "video":
            pixels = next(v for n, v in inputs.items() if n.startswith("pixel_values"))
            videos = [pixels.shape[1]] * pixels.shape[0]
        return regroup([(pooled(scores[..., None], side)[..., 0], pooled(keys, side))], videos)

    def _packed(self, call: _Call, kind: str, inputs: dict[str, Any], output: Any) -> list[Note]:
        """Patches of all videos in one row, those of a token one after another."""
        grids = inputs[f"{kind}_grid_thw"]
        config = self.base.config.vision_config
        merges = inputs.get(f"{kind}_merge_sizes")
        merges = [config.spatial_merge_size] * len(grids) if merges is None else merges.tolist()
        order = None if self.family is None else self.family.encoder_order
        every_score = torch.cat(call.scores, 1)[0]
        every_key = torch.cat(call.keys, 1)[0]
        videos: list[Note] = []
        start = 0
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


def encoder_attention(base: Any, family: Family | None, what: str) -> tuple[int, nn.Module]:
    """The number and the attention module of the last layer that the features come from.

    ``what`` is what the method needs of it.
    """
    path = None if family is None else family.vision_attention
    if path is None:
        whose = "a layout of your own" if family is None else base.config.model_type
        known = sorted(name for name, known in families().items() if known.vision_attention)
        raise UnsupportedError(
            f"the method needs {what}, and where that is, is not known for "
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
            f"the method needs {what}, and {path} of vision_feature_layer="
            f"{asked} is not in {type(base).__name__}: {error}; use a method that does without"
        ) from None
    return layer, module


def check_feature_layer(base: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse features of another layer than the config's."""
    asked = inputs.get("vision_feature_layer")
    ours = getattr(base.config, "vision_feature_layer", None)
    if asked is not None and asked != ours:
        raise UnsupportedError(
            f"vision_feature_layer={asked} was asked for, and the attention of the config's "
            f"{ours} is what the method gets; set it in the config before the block"
        )


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
