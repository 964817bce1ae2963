"""One model, one video, one question: what ``run`` and ``demo`` do between options and output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dycoke.cli.console import BadInput, err, out

if TYPE_CHECKING:
    from dycoke.assistant import Answer, Assistant
    from dycoke.compressor import Compressor
    from dycoke.report import Report
    from dycoke.video import Video

STAGE_ROWS = {
    "video decoding, s": "decode_s",
    "processor, s": "process_s",
    "vision encoder, s": "vision_s",
    "compression, s": "compress_s",
    "prefill, s": "prefill_s",
    "time to first token, s": "ttft_s",
    "time per token, s": "per_token_s",
    "total, s": "total_s",
}


def load_assistant(
    model: str | None, device: str | None, dtype: str | None, own_world: bool = False
) -> Assistant:
    """The model of a folder or hub id; ``own_world`` where the embedded one is at home."""
    if model is not None and not Path(model).is_dir() and _looks_like_a_path(model):
        raise BadInput(f"no model at {model}: there is no such directory")
    with err.status("loading the model"):
        from transformers.utils import logging

        from dycoke import nano
        from dycoke.assistant import Assistant, best_device
        from dycoke.precision import choose_format

        logging.disable_progress_bar()
        if model is None and not nano.is_trained():
            err.print(
                "note: the embedded model has random weights for now, so its words mean nothing; "
                "name a real one with --model"
            )
        elif model is None and not own_world:
            err.print(
                "note: the embedded model only knows its own little world of moving shapes; for "
                "any other clip name a real one with --model"
            )
        device = device or best_device()
        try:
            choice = choose_format(device, dtype, model is None or nano.is_at(model))
            err.print(f"number format: {choice}", highlight=False)
            return Assistant.load(model, device, choice.dtype)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            what = "the embedded model" if model is None else f"the model {model!r}"
            where = "" if device is None else f" on the device {device!r}"
            raise BadInput(f"cannot load {what}{where}: {error}") from None


def _looks_like_a_path(model: str) -> bool:
    """Hub ids are "name" or "owner/name"."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


@dataclass
class Session:
    """One model, one video, one question; asked once or twice.

    Attributes
    ----------
    decode_s : seconds that reading the video took.
    method : name of the method that is asked beside the full model.
    quiet : print no answers.
    """

    assistant: Assistant
    video: Video
    decode_s: float
    prompt: str
    max_new_tokens: int
    method: str = "dycoke"
    quiet: bool = False
    encode_frames: int | str = "auto"

    def title(self, compressor: Compressor | None) -> str:
        """What tables and answers call it."""
        if compressor is None:
            return "full"
        return {"dycoke": "DyCoke", "dycoke+": "DyCoke+"}.get(self.method, self.method)

    def warm_up(self) -> None:
        """Run once without timing, or whichever comes first would pay for starting up."""
        with err.status("warming up"):
            self._asked(max_new_tokens=2)

    def ask(self, compressor: Compressor | None) -> Answer:
        """An answer, shown while it comes; reading the video is in its timings."""
        name = self.title(compressor)
        with err.status(f"{name}: encoding {len(self.video.frames)} frames") as status:
            started = False

            def show(text: str) -> None:
                nonlocal started
                if not started:
                    started = True
                    status.stop()
                    out.print(f"[bold]{name}:[/bold] ", end="")
                out.print(text, end="", markup=False, soft_wrap=True)

            answer = self._asked(
                compressor=compressor,
                max_new_tokens=self.max_new_tokens,
                on_text=None if self.quiet else show,
            )
        if started:
            out.print()
        answer.timings.add_video(self.decode_s)
        return answer

    def _asked(self, **how: Any) -> Answer:
        from dycoke.errors import UnsupportedError

        try:
            return self.assistant.ask(
                self.video, self.prompt, encode_frames=self.encode_frames, **how
            )
        except UnsupportedError as error:
            raise BadInput(str(error)) from None


def as_dict(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "report": None if answer.report is None else answer.report.to_dict(),
        "timings": answer.timings.to_dict(),
    }


def report_table(answer: Answer, full: Answer | None, name: str) -> Table:
    """The report and the times; beside those of the full model, where there are such."""
    table = Table(title="without compression" if answer.report is None else name)
    table.add_column()
    if full is not None:
        table.add_column("full", justify="right")
    table.add_column(name, justify="right")
    if full is not None:
        table.add_column("ratio", justify="right")

    def line(name: str, ours: float, whole: float, form: Any) -> None:
        cells = [form(ours)]
        if full is not None:
            ratio = f"{whole / ours:.2f}x" if ours else "-"
            cells = [form(whole), form(ours), ratio]
        table.add_row(name, *cells)

    if answer.report is not None:
        _add_counts(table, line, answer.report, full is None)
    for title, key in STAGE_ROWS.items():
        whole = 0.0 if full is None else getattr(full.timings, key)
        line(title, getattr(answer.timings, key), whole, "{:.3f}".format)
    return table


def _add_counts(table: Table, line: Any, report: Report, alone: bool) -> None:
    """Tokens and bytes; and what only the method has, where it stands ``alone``."""
    visual = sum(s.visual_tokens for s in report.samples)
    kept = sum(s.kept_tokens for s in report.samples)
    active = sum(s.active_tokens for s in report.samples)
    line("visual tokens prefilled", kept, visual, str)
    line("visual tokens attended", active, visual, str)
    line("KV cache, KiB", report.kv_bytes / 1024, report.kv_bytes_full / 1024, "{:.0f}".format)
    if alone:
        table.add_row("of visual tokens", str(visual))
        table.add_row("refreshes", str(sum(s.refreshes for s in report.samples)))
        table.add_row("tokens recalled", str(sum(s.recalled_tokens for s in report.samples)))
    if report.reason:
        table.caption = f"not compressed: {report.reason}"
