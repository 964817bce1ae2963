"""The vision encoder without the cells that merging would drop (`skip` chooses them).

Hooks on the encoder's own blocks: in front of block `first` rows leave, so that norms, projections
and MLP run unchanged on fewer of them; attention gets keys and values of all places, where a row
that left is answered for by its counterpart's; behind the last block the outputs of the
counterparts fill the gaps, so that all shapes are stock again. Which cells were computed is noted
on the output as ``output.encoded``, one (bool (F, N),) per video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from dycoke import compat
from dycoke.attention import OVERRIDE, Override
from dycoke.core.method import Method, VideoContext
from dycoke.errors import UnsupportedError
from dycoke.models import Family, VideoSpan
from dycoke.models.locate import Finder
from dycoke.patching import Patches
from dycoke.vision.notes import Note, Notes
from dycoke.vision.scores import Vision, check_feature_layer, encoder_attention
from dycoke.vision.skip import answering, computed_cells, square_cells
from dycoke.vision.wrap import PIXELS, frames_given


@dataclass(eq=False)
class _Work:
    """One batch of videos on its way through the encoder.

    Attributes
    ----------
    videos : frames of each.
    cells : patches of each video's cells, (C, M) each; None where the patches are not packed, as
        all frames have as many.
    masks : which cells of each video are computed, (F, C), in the encoder's order.
    keep : rows that are computed, of all rows; None where all are.
    stand : for every row, the computed row that answers for it.
    before : computed rows before each row, and behind the last.
    shape : of the states that the first block got.
    lengths : rows of each frame, where the patches are not packed.
    all_starts : where slices or windows start among all rows, in the block at hand (packed).
    """

    videos: list[int]
    cells: list[Tensor] | None
    masks: list[Tensor] = field(default_factory=list)
    keep: Tensor | None = None
    stand: Tensor | None = None
    before: Tensor | None = None
    shape: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)
    all_starts: Tensor | None = None


class Skips(Notes):
    """Leaves cells out of the encoder of ``model``, from `install` on.

    Parameters
    ----------
    model : the model.
    family : its family; None where the user's own layout finds the videos.
    kinds : what may hold frames, of "video" and "image".
    method : says ``skip_ratio``, ``skip_layer`` and ``window``.
    images : frames of each video where frames are images; None where all images are one video.

    Raises
    ------
    UnsupportedError
        Where the family does not say how its encoder is built, or the layer is not in it.
    """

    NAME = "encoded"
    WHAT = "how patches become tokens"

    def __init__(
        self,
        model: Any,
        family: Family | None,
        kinds: Sequence[str],
        method: Method,
        images: Sequence[int] | None,
    ) -> None:
        super().__init__(model, kinds)
        self.family, self.ratio, self.window = family, method.skip_ratio, method.window
        self.images = images
        last, _ = encoder_attention(self.base, family, self.WHAT)
        assert family is not None and family.vision_attention is not None
        layers, self.attention = family.vision_attention.split(".*.")
        asked = getattr(self.base.config, "vision_feature_layer", -1)
        if not isinstance(asked, int):
            raise UnsupportedError(
                f"skip_ratio={self.ratio:g}: features of several layers of the encoder "
                f"(vision_feature_layer={asked}) are needed in full; use skip_ratio=0"
            )
        blocks = list(self.base.get_submodule(layers))
        first = len(blocks) // 8 if method.skip_layer is None else method.skip_layer
        if first > last:
            raise UnsupportedError(
                f"skip_layer={first}: the features come from layer {last} of the encoder's "
                f"{len(blocks)}; choose 0 to {last}"
            )
        self.blocks = blocks[first : last + 1]
        self.tower = self.base.get_submodule(layers.split(".")[0])

    def install(self, patches: Patches) -> None:
        """Put hooks on the blocks and wrap the methods that encode."""
        for name in ("get_video_features", "get_image_features"):
            if hasattr(vars(self.base).get(name), "in_chunks"):
                raise UnsupportedError(
                    "encode_in_chunks is around the model already, and chunks must be whole "
                    "windows; enter it inside the block"
                )
        assert self.family is not None
        packed = self.family.token_side is None
        for block in self.blocks:
            module = block.get_submodule(self.attention)
            Override(patches, module, self._attend, packed=packed)
        patches.hook(self.blocks[0], self._enter)
        if packed:
            for block in self.blocks:
                patches.hook(block, self._shrink)
            for merger in getattr(self.tower, "deepstack_merger_list", None) or ():
                patches.hook(merger, self._fill)
        patches.hook(self.blocks[-1], None, self._leave, first=True)
        super().install(patches)
        patches.replace(self.base, "encoded_window", self.window)

    def take(self, spans: Sequence[VideoSpan], device: torch.device | None) -> list[Note]:
        notes = super().take(spans, device)
        for span, (mask,) in zip(spans, notes, strict=True):
            if not mask[:: self.window].all():
                raise UnsupportedError(
                    f"a video of {len(span.positions)} frames was encoded as a part of another "
                    "one, so that its anchors were not computed; say in frame_source how many "
                    "images each video has, or use skip_ratio=0"
                )
        return notes

    # A batch

    def begin(self, kind: str, inputs: dict[str, Any]) -> _Work | None:
        check_feature_layer(self.base, inputs)
        pixels = next((v for name, v in inputs.items() if name.startswith("pixel_values")), None)
        frames = frames_given(
            {**inputs, PIXELS[kind]: pixels}, kind
        )  # older releases have one name
        if frames is None:
            return None
        cells = None
        if (grids := inputs.get(f"{kind}_grid_thw")) is not None:
            merges = inputs.get(f"{kind}_merge_sizes")
            if merges is None:
                merges = torch.tensor(self.base.config.vision_config.spatial_merge_size).expand(
                    len(grids)
                )
            cells = [
                torch.arange(height * width).view(-1, merge**2)
                for (_, height, width), merge in zip(grids.tolist(), merges.tolist(), strict=True)
            ]
        if kind == "image":
            count = sum(frames)
            groups = [count] if self.images is None else list(self.images)
            if sum(groups) != count:
                raise UnsupportedError(
                    f"the encoder got {count} images at once, and frame_source says "
                    f"{groups}; encode a prompt's images together, or use skip_ratio=0"
                )
            if cells is not None:
                starts = list(accumulate([0, *groups[:-1]]))
                cells = [cells[start] for start in starts if start < len(cells)]
            frames = groups
        return _Work([n for n in frames if n], cells)

    def finish(
        self, work: _Work | None, kind: str, inputs: dict[str, Any], output: Any
    ) -> list[Note]:
        if work is None:
            return []
        rows = sum(video.shape[:-1].numel() for video in output.pooler_output)
        if not work.masks:  # encoded in full
            tokens = rows // sum(work.videos)
            sizes = [tokens] * len(work.videos) if work.cells is None else map(len, work.cells)
            whole = zip(work.videos, sizes, strict=True)
            return [(torch.ones(frames, size, dtype=torch.bool),) for frames, size in whole]
        order = None if self.family is None else self.family.encoder_order
        if work.cells is None or order is None:
            return [(mask,) for mask in work.masks]
        config, grids = self.base.config.vision_config, inputs[f"{kind}_grid_thw"].tolist()
        notes: list[Note] = []
        starts = accumulate([0, *(1 if kind == "video" else n for n in work.videos)])
        for mask, start, members in zip(work.masks, starts, work.cells, strict=False):
            merge = isqrt(members.shape[1])
            _, height, width = grids[start]
            back = order(config, (1, height // merge, width // merge)).argsort()
            notes.append((mask[:, back.to(mask.device)],))
        return notes

    # The blocks

    @property
    def _work(self) -> _Work | None:
        """The batch, while rows of it are left out."""
        work: _Work | None = self._local.call
        return None if work is None or work.keep is None else work

    def _enter(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """In front of the first block: which rows stay."""
        work: _Work | None = self._local.call
        if work is None:
            return None
        inputs = compat.named(block, args, kwargs)
        states, mask = inputs["hidden_states"], inputs.get("attention_mask")
        if mask is not None and not _sees_all(mask):
            return None  # frames with padding are encoded in full
        if states.requires_grad:
            raise UnsupportedError(
                f"skip_ratio={self.ratio:g} is for inference; encode under torch.no_grad(), or use "
                "skip_ratio=0"
            )
        keep = self._choose(work, states)
        if keep is None:
            return None
        rows = states[keep][None] if work.cells is None else states[keep]
        return _with(block, args, kwargs, hidden_states=rows)

    def _choose(self, work: _Work, states: Tensor) -> Tensor | None:
        """Fill in ``work``; rows that stay, bool, of the states' own shape; None where all do."""
        work.shape, parts, videos = tuple(states.shape), [], []
        if work.cells is None:
            frames, length = states.shape[:2]
            if frames != sum(work.videos):
                raise compat.unknown(f"the encoder got {frames} frames of {sum(work.videos)}")
            side = isqrt(length)
            classes = length - side**2  # a class token comes first
            assert self.family is not None
            if self.family.token_side is None:
                raise UnsupportedError(
                    f"{self.WHAT} is not known for {self.family.name}, whose frames come side by "
                    "side; state token_side in its Family, or use skip_ratio=0"
                )
            tokens = self.family.token_side(self.base.config, side)
            members = [square_cells(side, tokens)] * len(work.videos)
            videos = list(torch.split(states, work.videos))
        else:
            classes, members = 0, work.cells
            counts = [n * cells.numel() for n, cells in zip(work.videos, members, strict=True)]
            if states.ndim != 2 or len(states) != sum(counts):
                raise compat.unknown(
                    f"the encoder got states {tuple(states.shape)} of {sum(counts)} patches"
                )
            cut = zip(torch.split(states, counts), work.videos, strict=True)
            videos = [part.view(frames, -1, states.shape[-1]) for part, frames in cut]
        start, roots = 0, []
        for video, cells in zip(videos, members, strict=True):
            cells = cells.to(video.device)
            chosen = computed_cells(video[:, classes:], cells, self.ratio, self.window)
            keep = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
            keep[:, classes:] = False
            frame, cell = chosen.nonzero(as_tuple=True)
            keep[frame[:, None], classes + cells[cell]] = True
            length = video.shape[1]
            place = torch.arange(length, device=video.device)
            roots.append((start + answering(keep, self.window) * length + place).flatten())
            start += keep.numel()
            parts.append(keep)
            # What is computed, be it for the neighbours' sake, where cells share patches.
            work.masks.append(keep[:, classes + cells].all(-1))
        rows = torch.cat([part.flatten() for part in parts])
        if bool(rows.all()):
            return None
        number = rows.long().cumsum(0)
        work.keep, work.stand = rows, (number - 1)[torch.cat(roots)]
        work.before = torch.cat([number.new_zeros(1), number])
        if work.cells is None:
            work.lengths = torch.cat([part.sum(1) for part in parts]).tolist()
            return rows.view(states.shape[:2])
        return rows

    def _shrink(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """In front of a block of packed rows: what is said of each row, and where slices start."""
        work = self._work
        if work is None:
            return None
        assert work.keep is not None and work.before is not None
        inputs = compat.named(block, args, kwargs)
        if "cu_seqlens" not in inputs or inputs.get("position_embeddings") is None:
            raise compat.unknown(f"{type(block).__name__} is not handed where its slices start")
        work.all_starts = starts = inputs["cu_seqlens"]
        return _with(
            block,
            args,
            kwargs,
            cu_seqlens=work.before[starts.long()].to(starts.dtype),
            position_embeddings=tuple(x[work.keep] for x in inputs["position_embeddings"]),
        )

    def _attend(self, inner: Any, module: nn.Module, args: list[Any], kwargs: Any) -> Any:
        """Attention of the computed rows to all places."""
        work, starts = self._work, kwargs.get("cu_seq_lens_q")
        flash = vars(module)[OVERRIDE].flash
        if work is None and (starts is None or flash):
            return inner(module, *args, **kwargs)
        query, keys, values = args[:3]
        all_starts = starts
        if work is not None:
            assert work.stand is not None
            keys, values = (part.index_select(2, work.stand) for part in (keys, values))
            all_starts = work.all_starts
        if starts is None:
            assert work is not None
            lengths, all_lengths = work.lengths, [work.shape[1]] * len(work.lengths)
        else:
            assert all_starts is not None
            lengths, all_lengths = starts.diff().tolist(), all_starts.diff().tolist()
            if flash:
                sizes = {"max_length_q": max(lengths), "max_length_k": max(all_lengths)}
                ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": all_starts}
                more = {**kwargs, **ends, **sizes}
                return inner(module, query, keys, values, *args[3:], **more)
        rest = {
            name: value
            for name, value in kwargs.items()
            if not name.startswith(("cu_seq", "max_length"))
        }
        attend = partial(inner, module)
        made = _by_size(attend, query, keys, values, lengths, all_lengths, rest)
        return made, None

    def _fill(self, merger: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Features for deeper layers are taken from between the blocks."""
        work = self._work
        if work is None:
            return None
        return (args[0][work.stand], *args[1:]), kwargs

    def _leave(self, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the last block: all rows again."""
        work = self._work
        if work is None or output is None:
            return None
        states = output[0] if isinstance(output, tuple) else output
        rows = states if work.cells is not None else states[0]
        made = rows[work.stand].view(work.shape)
        work.keep = None
        return (made, *output[1:]) if isinstance(output, tuple) else made


def encoder_notes(
    model: Any, finder: Finder, method: Method, trace: bool
) -> tuple[Vision | None, Skips | None]:
    """What a method wants to know of the encoder, and to leave out of it."""
    vision = skips = None
    works = not method.idle
    if method.needs_vision and (trace or works):
        vision = Vision(model, finder.family, finder.kinds)
    if method.skip_ratio > 0 and works:
        if vision is not None:
            raise UnsupportedError(
                f"{type(method).__name__} needs the encoder's attention of all patches, and "
                f"skip_ratio={method.skip_ratio:g} leaves some out; use skip_ratio=0"
            )
        images = finder.frame_source
        counts = None if isinstance(images, str) else images
        skips = Skips(model, finder.family, finder.kinds, method, counts)
    return vision, skips


def contexts_of(
    spans: Sequence[VideoSpan],
    device: torch.device | None = None,
    vision: Vision | None = None,
    skips: Skips | None = None,
) -> list[VideoContext]:
    """What a method may know of each video: the sizes of its sample's videos, and the notes."""
    sizes: dict[int, list[int]] = {}
    numbers = []
    for span in spans:
        videos = sizes.setdefault(span.sample, [])
        numbers.append(len(videos))
        videos.append(span.positions.numel())
    nothing: list[Any] = [(None, None)] * len(spans)
    seen = nothing if vision is None else vision.take(spans, device)
    encoded = nothing if skips is None else skips.take(spans, device)
    # A layout that does not know the grid says (1, N).
    grids = [span.grid if span.grid[0] > 1 else None for span in spans]
    return [
        VideoContext(scores, keys, tuple(sizes[span.sample]), number, grid, mask[0])
        for span, number, (scores, keys), grid, mask in zip(
            spans, numbers, seen, grids, encoded, strict=True
        )
    ]


def _with(block: nn.Module, args: Any, kwargs: dict[str, Any], **new: Any) -> Any:
    """The arguments of a block with some replaced, as they came: what is told by place stays so.

    transformers notes the first one of each block as the hidden states.
    """
    places = {name: i for i, name in enumerate(compat.parameters(block)[: len(args)])}
    args = [new.pop(name) if name in new else args[i] for name, i in places.items()]
    return tuple(args), kwargs | new


def _by_size(
    attend: Any,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    all_lengths: Sequence[int],
    rest: dict[str, Any],
) -> Tensor:
    """Attention piece by piece, pieces of one size in one call.

    Parameters
    ----------
    query : Tensor, (1, H, rows, D)
    keys, values : Tensor, (1, H, all rows, D)
    lengths, all_lengths : rows of each piece, of the queries and of the keys.

    Returns
    -------
    Tensor, (1, rows, H, D)
    """
    queries, every_key, every_value = (
        torch.split(part[0], list(sizes), 1)
        for part, sizes in ((query, lengths), (keys, all_lengths), (values, all_lengths))
    )
    alike: dict[tuple[int, int], list[int]] = {}
    for piece, sizes in enumerate(zip(lengths, all_lengths, strict=True)):
        if sizes[0]:
            alike.setdefault(sizes, []).append(piece)
    made = query.new_empty(query.shape[2], query.shape[1], values.shape[-1])
    starts = list(accumulate([0, *lengths]))
    for pieces in alike.values():
        parts = (queries, every_key, every_value)
        stacked = (torch.stack([part[i] for i in pieces]) for part in parts)
        for i, rows in zip(pieces, attend(*stacked, None, **rest)[0], strict=True):
            made[starts[i] : starts[i + 1]] = rows
    return made[None]


def _sees_all(mask: Tensor) -> bool:
    """Whether an attention mask of any backend hides nothing."""
    return bool(mask.all() if mask.dtype == torch.bool or mask.ndim == 2 else (mask == 0).all())
