"""What one forward of a compressed generation did, as listeners get it; and the trace, one of them.

A `Step` refers to tensors that are there anyway and costs nothing until somebody looks: the engine
makes one only where somebody listens, and only `Step.samples` waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class VideoMasks:
    """Which tokens of one video are where, on the model's device.

    Attributes
    ----------
    keep : Tensor, bool, (F, N): the tokens that merging left; they entered the LLM.
    encoded : Tensor, bool, (F, N), or None: those that the vision encoder computed; None for all.
    grid : (int, int): rows and columns of one frame, N in all; (1, N) where they are not known.
    """

    keep: Tensor
    encoded: Tensor | None
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class SampleStep:
    """One row of the batch in one step, on the CPU.

    Attributes
    ----------
    active : Tensor, bool, (Nv,): which of the row's kept visual tokens (raster order, all videos)
        the pruned layers attended to.
    recalled : Tensor, bool, (Nv,): those of them that came back in this step.
    attention : Tensor, (Nv,), or None: the newest token's attention to them in the scoring layer, a
        mean over heads.
    """

    active: Tensor
    recalled: Tensor
    attention: Tensor | None


@dataclass(frozen=True, eq=False)
class Step:
    """One forward, once it is done: the prompt's, and then one per token.

    Forward i writes token i of the answer, and feeds token i - 1. Tensors are on the model's
    device and are the cache's own: read them, and copy what is to outlive the call.

    Attributes
    ----------
    generation : tells the generations of one run apart; copies of a cache go on as their own.
    index : 0 for the forward of a prompt or of a follow-up question, else the decode step, from 1.
    ids : Tensor, long, (B, S), or None: the tokens that were fed; None where the caller gave no
        ids.
    videos : per row of the batch, the masks of its videos. Every step brings the same ones.
    valid : Tensor, bool, (B, V): False for padding; V is the most kept visual tokens in a row.
    active : Tensor, bool, (B, V): what the pruned layers attended to. A prompt attends to
        everything that merging left, except what a method dropped inside the LLM.
    recalled : Tensor, bool, (B, V): what came back from the bank. The first selection recalls
        nothing.
    attention : Tensor, (B, V), or None: the newest token's attention in the scoring layer, a mean
        over heads, 0 for padding. None where no layer scores, and for prompts but with a late
        scoring layer.
    """

    generation: int
    index: int
    ids: Tensor | None
    videos: list[list[VideoMasks]]
    valid: Tensor
    active: Tensor
    recalled: Tensor
    attention: Tensor | None

    @cached_property
    def samples(self) -> list[SampleStep]:
        """The rows of the batch without padding, copied to the CPU."""
        valid, active, recalled = self.valid.cpu(), self.active.cpu(), self.recalled.cpu()
        scores = None if self.attention is None else self.attention.detach().cpu()
        return [
            SampleStep(
                active[b][real], recalled[b][real], None if scores is None else scores[b][real]
            )
            for b, real in enumerate(valid)
        ]


OnStep = Callable[[Step], None]
"""What is called after each forward, in the thread of generate, with the model free again."""


@dataclass(eq=False)
class SampleTrace:
    """What one sample kept and attended to, on the CPU.

    Attributes
    ----------
    keep : list of Tensor, bool, (F, N): per video, the tokens that merging left.
    active : list of Tensor, bool, (Nv,): per decode step, which of the sample's kept visual
        tokens (raster order, all videos) the pruned layers attended to.
    attention : list of Tensor, (Nv,): per decode step, the newest token's attention to them in
        the scoring layer, a mean over heads.
    encoded : list of Tensor, bool, (F, N): per video, the tokens that the vision encoder computed;
        empty where it computed all.
    """

    keep: list[Tensor]
    active: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, videos: list[VideoMasks]) -> SampleTrace:
        encoded = [video.encoded.cpu() for video in videos if video.encoded is not None]
        return cls([video.keep.cpu() for video in videos], encoded=encoded)

    def copy(self) -> SampleTrace:
        return SampleTrace(
            list(self.keep), list(self.active), list(self.attention), list(self.encoded)
        )


@dataclass(eq=False)
class Trace:
    """Everything that ``trace=True`` keeps of a generation: one entry per row of the batch."""

    samples: list[SampleTrace] = field(default_factory=list)

    def on_step(self, step: Step) -> None:
        """Listen: masks once, and then what decode steps attended to, where a layer scores."""
        if not self.samples:
            self.samples = [SampleTrace.of(videos) for videos in step.videos]
        if step.index == 0:
            return
        for sample, row in zip(self.samples, step.samples, strict=True):
            if row.attention is not None:
                sample.active.append(row.active)
                sample.attention.append(row.attention)
