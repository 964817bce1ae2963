"""``dycoke run``: a question about a video file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dycoke.cli import options
from dycoke.cli.clip import ReadingClip
from dycoke.cli.console import BadInput, out
from dycoke.cli.session import Session, as_dict, load_assistant, report_table


def run(
    video: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to ask about the video.")
    ] = "Describe what happens in this video.",
    model: options.Model = None,
    frames: options.FrameCount = 32,
    stream: options.Stream = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    encode_frames: Annotated[
        str,
        typer.Option(help="Most frames that the vision encoder takes at once, or auto: by memory."),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option(help="By its name, see dycoke methods [default: dycoke]")
    ] = None,
    retention: options.Retention = None,
    merge_ratio: options.MergeRatio = None,
    token_budget: options.TokenBudget = None,
    prune_ratio: options.PruneRatio = None,
    prune_layer: options.PruneLayer = None,
    score_layer: options.ScoreLayer = None,
    echo: options.Echo = None,
    echo_exact: options.EchoExact = None,
    skip_ratio: options.SkipRatio = None,
    skip_layer: options.SkipLayer = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run without compression, and compare.")
    ] = False,
    no_compress: Annotated[
        bool, typer.Option("--no-compress", help="Run the model as it is: --method full.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 128,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """Ask a video LLM about a video, with DyCoke or another method."""
    options.exclusive(compare=compare, no_compress=no_compress)
    options.exclusive(method=method, no_compress=no_compress)
    name = "full" if no_compress else method or "dycoke"
    if compare and name == "full":
        raise BadInput("--compare compares a method with the full model; name another --method")
    at_once = _encode_frames(encode_frames)
    # The file is first, since a bad one is found at once.
    with ReadingClip(video, frames, stream, max_pixels) as reading:
        settings = options.given_settings(
            merge_ratio=merge_ratio,
            token_budget=token_budget,
            prune_ratio=prune_ratio,
            prune_layer=prune_layer,
            score_layer=score_layer,
            echo=echo,
            echo_exact=echo_exact,
            skip_ratio=skip_ratio,
            skip_layer=skip_layer,
        )
        compressor = options.method_of(name, retention, settings)
        assistant = load_assistant(model, device, dtype)
        frames_read, decode_s = reading.video()
    session = Session(
        assistant, frames_read, decode_s, prompt, max_new_tokens, name, as_json, at_once
    )
    if compare:
        session.warm_up()
    full = session.ask(None) if compare else None
    answer = session.ask(compressor)
    if as_json:
        result = as_dict(answer) | ({} if full is None else {"full": as_dict(full)})
        print(json.dumps(result))  # not through rich, which would wrap it
    else:
        out.print(report_table(answer, full, session.title(compressor)))


def _encode_frames(value: str) -> int | str:
    """ "auto", or a number of at least 2."""
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 2:
        raise BadInput(f"--encode-frames must be auto or a number of at least 2, got {value!r}")
    return int(value)
