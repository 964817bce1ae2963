"""The state of one forward, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dycoke.core.cache_rules import DycokeCache
from dycoke.core.echo import Echoes
from dycoke.core.method import VisualTokens
from dycoke.core.records import Record
from dycoke.core.steps import OnStep, Step
from dycoke.models import VideoSpan


@dataclass(eq=False)
class Forward:
    """One forward of the model, from its first hook to its last.

    Attributes
    ----------
    labels, encoded : whether labels were given; the vision encoder's outputs, where they were.
    inputs : what the base model received, by name.
    videos, reason : the video tokens of the prompt, or why there is nothing to compress.
    length : tokens that come into the decoder, before any are dropped.
    cache, prefill : ours, where there is one; and whether it is new.
    decodes : whether it takes the view of a decode step.
    record, decode_step : where it is counted, and whether as a decode step.
    attention_mask : the user's, (B, logical length), or None.
    lower_mask, upper_masks : which keys the lower layers may see, (B, rows), or None; per device,
        what the upper layers hand to their attention function.
    scores, source : attention of each prompt's last token, (B, rows), where a method drops rows
        inside, and the rows that stayed, (B, rows left), once they are known.
    echoes : the merged tokens, where the lower layers still see them.
    echo_layers, exact_layers : layers that saw them so far, and those of them that were exact.
    visual : the visual tokens as the forward began; None where it is left alone.
    reached : calls of overridden attention modules, to know that none went another way.
    """

    labels: bool = False
    encoded: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)
    videos: list[VideoSpan] = field(default_factory=list)
    reason: str | None = None
    length: int = 0
    cache: DycokeCache | None = None
    prefill: bool = False
    record: Record | None = None
    decode_step: bool = False
    decodes: bool = False
    attention_mask: Tensor | None = None
    lower_mask: Tensor | None = None
    upper_masks: dict[torch.device, Any] = field(default_factory=dict)
    scores: Tensor | None = None
    source: Tensor | None = None
    echoes: Echoes | None = None
    echo_layers: int = 0
    exact_layers: int = 0
    visual: VisualTokens | None = None
    reached: int = 0

    def tell(self, on_step: OnStep | None) -> None:
        """Tell the trace and ``on_step`` what this forward did, once it is done and counted."""
        record, before, kind = self.record, self.visual, "none"
        if record is None or before is None:
            return
        visual = before
        if self.cache is not None:
            visual, kind = self.cache.generation.visual, self.cache.generation.kind
        # Until a decode step, what is called active only stands in for the selection.
        stands_in = kind == "select" and not self.decodes
        active = visual.valid if stands_in else visual.active
        first = stands_in or before.previous is None  # nothing was in a bank yet
        step = Step(
            generation=record.number,
            index=record.decode_steps,
            ids=self.inputs.get("input_ids"),
            videos=record.masks,
            valid=visual.valid,
            active=active,
            recalled=active & ~(active if first else before.active),
            attention=visual.previous,
        )
        if record.trace is not None:
            record.trace.on_step(step)
        if on_step is not None:
            on_step(step)
