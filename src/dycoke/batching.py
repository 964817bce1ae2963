"""Several requests answered as one left-padded batch; each row streams, and stops, on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from dycoke.assistant import GREEDY, Answer, Assistant, ends_of
from dycoke.compressor import Compressor, Run
from dycoke.core.steps import OnStep
from dycoke.errors import UnsupportedError
from dycoke.models.locate import FrameSource, frame_source_of
from dycoke.report import Report
from dycoke.timing import Stopwatch
from dycoke.vision.chunks import AUTO, encode_in_chunks

OnToken = Callable[["Row", str], None]


@dataclass(eq=False)
class Row:
    """One request's place in a batch.

    Attributes
    ----------
    max_new_tokens : its own limit, at least 1.
    stop : texts that end the answer, which does not hold them.
    on_token : called after each of its tokens with the row and the text that is certain now, which
        may be empty; in the thread that generates.
    cancelled : asked after each token; True ends the row.
    ids : the tokens so far.
    finish_reason : "stop", "length" or "cancelled", once it is known.
    text : the answer so far.
    report : what was compressed up to its last token; None without a compressor.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    on_token: OnToken | None = None
    cancelled: Callable[[], bool] = lambda: False
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    text: str = ""
    report: Report | None = None
    _told: int = 0

    @property
    def done(self) -> bool:
        """Whether its answer is complete."""
        return self.finish_reason is not None

    def take(self, token: int, tokenizer: Any, ends: set[int]) -> bool:
        """Take in the next token; whether it is the last one."""
        self.ids.append(token)
        whole: str = tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        found = [place for stop in self.stop if (place := whole.find(stop)) >= 0]
        if found:
            whole, self.finish_reason = whole[: min(found)], "stop"
        elif token in ends:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        elif self.cancelled():
            self.finish_reason = "cancelled"
        self.text = whole.rstrip()
        certain = len(self.text) if self.finish_reason else self._certain()
        piece = self.text[self._told : certain]
        self._told = max(self._told, certain)
        if self.on_token is not None:
            self.on_token(self, piece)
        return self.done

    def _certain(self) -> int:
        """How much of the text no later token can change or take back."""
        # A character of several tokens is shown as this one until it is complete.
        text = self.text.rstrip("\ufffd").rstrip()
        cut = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(text)), cut, -1):
                if text.endswith(stop[:length]):
                    cut = length
                    break
        return len(text) - cut


class _Rows(StoppingCriteria):
    """Hands each new token to its row, and stops the rows that are done."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: Any, ends: set[int], run: Run | None
    ) -> None:
        self.rows, self.tokenizer, self.ends, self.run = rows, tokenizer, ends, run

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        for place, token in enumerate(input_ids[:, -1].tolist()):
            row = self.rows[place]
            if row.done:
                continue
            ended = row.take(token, self.tokenizer, self.ends)
            # Now, since its steps are counted on while it waits for the others.
            if ended and self.run is not None:
                row.report = _of_sample(self.run.report, place)
        done = [row.done for row in self.rows]
        return torch.tensor(done, device=input_ids.device)


def shapes(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for inputs of one request each to become one batch."""
    ids = inputs["input_ids"].shape
    return tuple(
        (name, value.dtype, value.shape[1:])
        for name, value in sorted(inputs.items())
        if isinstance(value, Tensor) and value.shape != ids
    )


def collate(inputs: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """One left-padded batch of inputs of one request each.

    Parameters
    ----------
    inputs : as `Assistant.prepare` makes them, of equal `shapes`.
    pad : the token that fills up.

    Returns
    -------
    dict
        What is said of each token is (B, S); all else one behind the other.
    """
    if len({shapes(one) for one in inputs}) > 1:
        raise UnsupportedError(
            "these requests' frames differ in number or size, which this model takes in batches "
            "of their own only"
        )
    longest = max(one["input_ids"].shape[1] for one in inputs)
    made: dict[str, Any] = {}
    for name, first in inputs[0].items():
        values = [one[name] for one in inputs]
        if not isinstance(first, Tensor):
            made[name] = [item for value in values for item in value]
            continue
        if first.shape == inputs[0]["input_ids"].shape:
            fill = pad if name == "input_ids" else 0
            values = [
                torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill)
                for value in values
            ]
        made[name] = torch.cat(values)
    return made


def answer_rows(
    assistant: Assistant,
    inputs: Mapping[str, Any],
    rows: Sequence[Row],
    compressor: Compressor | None = None,
    *,
    on_step: OnStep | None = None,
    frame_source: FrameSource | None = None,
    before: tuple[float, float] = (0.0, 0.0),
    encode_frames: int | str = AUTO,
    **generate: Any,
) -> list[Answer]:
    """Answer the rows of one batch.

    Parameters
    ----------
    assistant : the model and its processor.
    inputs : of `collate`, `Assistant.prepare`, or `Seen.inputs`.
    rows : one for each row of the inputs.
    compressor, on_step, encode_frames : as in `Assistant.ask`.
    frame_source : as in `Compressor.__call__`; None for the family's own.
    before : seconds of decoding and of the processor, for the timings.
    generate : further arguments of the model's ``generate``, greedy unless they say otherwise.

    Returns
    -------
    list of Answer
        Each with its own ``finish_reason``, and a report of its own sample up to its last token;
        bytes in it are those of the whole batch then, as are the timings.
    """
    model, tokenizer = assistant.model, assistant.processor.tokenizer
    ids = inputs["input_ids"]
    if len(rows) != len(ids):
        raise ValueError(f"{len(ids)} prompts need as many rows, got {len(rows)}")
    if not generate.get("do_sample"):
        generate = GREEDY | generate
    watch = Stopwatch(model)
    source = frame_source if frame_source is not None else frame_source_of(model.config)
    compressing = watch.compressing(compressor, False, source, on_step)
    # Chunks inside the block: where the encoder leaves cells out, they are whole windows.
    with compressing as run, encode_in_chunks(model, encode_frames):
        model.generate(
            **inputs,
            **generate,
            max_new_tokens=max(row.max_new_tokens for row in rows),
            stopping_criteria=[_Rows(rows, tokenizer, ends_of(model), run)],
            **({} if "pad_token_id" in generate else {"pad_token_id": pad_of(assistant)}),
        )
    watch.timings.add_video(*before)
    return [
        Answer(
            text=row.text,
            tokens=tuple(tokenizer.convert_ids_to_tokens(row.ids)),
            report=row.report,
            timings=watch.timings,
            finish_reason=row.finish_reason or "stop",
        )
        for row in rows
    ]


def pad_of(assistant: Assistant) -> int:
    """The token that fills up prompts and answers that are shorter than others."""
    pad = assistant.processor.tokenizer.pad_token_id
    return int(min(ends_of(assistant.model)) if pad is None else pad)


def _of_sample(report: Report | None, sample: int) -> Report | None:
    """The report of one row of a batch."""
    if report is None or len(report.samples) <= sample:
        return report
    own = report.samples[sample]
    return replace(
        report,
        samples=(own,),
        retention=own.retention,
        final_retention=own.final_retention,
    )
