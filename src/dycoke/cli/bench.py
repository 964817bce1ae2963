"""``dycoke bench``: speed and memory of the methods, side by side."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dycoke.cli import options
from dycoke.cli.console import BadInput, err, out

if TYPE_CHECKING:
    from dycoke.bench.plan import Plan


def bench(
    arch: Annotated[
        str | None, typer.Option(help="True shapes with random weights: llava-onevision-7b, ...")
    ] = None,
    model: options.Model = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; see dycoke methods.")
    ] = "full,dycoke",
    retention: options.Retention = None,
    echo: options.Echo = None,
    echo_exact: options.EchoExact = None,
    skip_ratio: options.SkipRatio = None,
    skip_layer: options.SkipLayer = None,
    video: Annotated[Path | None, typer.Option(help="[default: a rendered story]")] = None,
    frames: options.FrameCount = 32,
    stream: options.Stream = None,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Measured turns of all methods.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Copies of the prompt in a batch.")] = 1,
    layers: Annotated[
        int | None, typer.Option(help="Cut an architecture's language model; the output says so.")
    ] = None,
    vision_layers: Annotated[
        int | None, typer.Option(help="Cut an architecture's vision encoder; the output says so.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: Annotated[
        str | None, typer.Option(help="Such as flash_attention_2 [default: transformers' choice]")
    ] = None,
    peak: Annotated[
        bool, typer.Option(help="On the CPU, measure each method's peak memory in a process.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here, too.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where to save the bars.")] = Path(
        "dycoke-bench.png"
    ),
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Instead: requests per second of dycoke serve, on this model."
        ),
    ] = False,
    concurrency: Annotated[
        str, typer.Option(help="With --serve: requests under way at once, comma-separated.")
    ] = "1,4,16",
    check_paper: Annotated[
        bool, typer.Option("--check-paper", help="Print the paper's FLOPs and ours, and stop.")
    ] = False,
) -> None:
    """Speed and memory of the methods, stage by stage; one line of JSON comes last.

    With --echo, --echo-exact, --skip-ratio or --skip-layer each method that has such settings is
    measured twice: as it is, and with them.
    """
    if check_paper:
        from dycoke.cli.lists import list_flops

        list_flops()
        return
    options.exclusive(arch=arch, model=model)
    if serve:
        for name, value in {
            "arch": arch,
            "retention": retention,
            "echo": echo,
            "echo_exact": echo_exact,
            "skip_ratio": skip_ratio,
            "skip_layer": skip_layer,
            "stream": stream,
            "layers": layers,
            "vision_layers": vision_layers,
            "attention": attention,
            "batch": None if batch == 1 else batch,
            "max_pixels": None if max_pixels == options.MAX_PIXELS else max_pixels,
        }.items():
            options.exclusive(serve=serve, **{name: value})
        options.check_folder(json_file)
        server = {"--model": model, "--device": device, "--dtype": dtype}
        given = [part for pair in server.items() if pair[1] is not None for part in pair]
        file = None if video is None else str(video)
        _serve(methods, concurrency, repeat, file, frames, new_tokens, given, device, json_file)
        return
    if arch is None and (layers, vision_layers) != (None, None):
        raise BadInput("--layers and --vision-layers cut random weights only; name an --arch")
    options.check_folder(json_file, picture)
    from dycoke.bench.arch import arch_of
    from dycoke.bench.plan import Plan

    try:
        plan = Plan(
            methods=tuple(options.comma_separated(methods)),
            arch=None if arch is None else arch_of(arch).cut(layers, vision_layers),
            model=model,
            video=None if video is None else str(video),
            frames=frames,
            stream=stream,
            max_pixels=max_pixels,
            new_tokens=new_tokens,
            repeat=repeat,
            batch=batch,
            retention=retention,
            device=device,
            attention=attention,
            dtype=dtype,
            settings=options.given_settings(
                echo=echo, echo_exact=echo_exact, skip_ratio=skip_ratio, skip_layer=skip_layer
            ),
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    _show(*_measure(plan, peak), json_file, picture)


def _serve(
    methods: str,
    concurrency: str,
    repeat: int,
    video: str | None,
    frames: int,
    new_tokens: int,
    server: list[Any],
    device: str | None,
    json_file: Path | None,
) -> None:
    """Measure a server, and show it."""
    from dycoke.bench import show
    from dycoke.bench.results import origin
    from dycoke.cli.serve import needs_extra

    needs_extra()
    from dycoke.methods import METHODS
    from dycoke.serve.load import Load, LoadError, measure

    counts = options.comma_separated(concurrency)
    if not counts or not all(count.isdecimal() and int(count) for count in counts):
        raise BadInput(f"--concurrency must be counts such as 1,4,16, got {concurrency!r}")
    names = tuple(options.comma_separated(methods))
    if unknown := [name for name in names if name not in METHODS]:
        raise BadInput(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if video is not None and not Path(video).is_file():
        raise BadInput(f"{video}: no such file")
    load = Load(
        methods=names,
        concurrency=tuple(map(int, counts)),
        repeat=repeat,
        video=video,
        frames=frames,
        new_tokens=new_tokens,
        server=tuple(server),
    )
    try:
        rows = measure(load, lambda what: err.print(what, markup=False))
    except LoadError as error:
        raise BadInput(str(error)) from None
    out.print(show.load_table(rows))
    from dycoke.assistant import best_device

    content = {
        **origin(["dycoke", *sys.argv[1:]], device or best_device()),
        "frames": frames,
        "new_tokens": new_tokens,
        "repeat": repeat,
        "results": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


def _measure(plan: Plan, peak: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured, and a row per method."""
    from transformers.utils import logging

    from dycoke.bench.plan import video_file
    from dycoke.bench.results import measure
    from dycoke.bench.speed import BenchError
    from dycoke.errors import UnsupportedError
    from dycoke.video import VideoError

    logging.disable_progress_bar()
    err.print(f"number format: {plan.number_format}", highlight=False)
    try:
        with video_file(plan) as path, err.status("building the model") as status:

            def tell(what: str) -> None:
                status.update(what)
                if not err.is_terminal:  # a log of a long run should show that it goes on
                    err.print(what, markup=False)

            return measure(plan, path, shlex.join(["dycoke", *sys.argv[1:]]), tell, peak)
    except (VideoError, UnsupportedError, BenchError) as error:
        raise BadInput(str(error)) from None


def _show(
    head: dict[str, Any], rows: list[dict[str, Any]], json_file: Path | None, picture: Path
) -> None:
    from dycoke.bench import show

    for table in show.speed_tables(head, rows):
        out.print(table)
    show.bars(head, rows).save(picture, format="PNG")
    out.print(f"saved {picture}: seconds per stage")
    content = {**head, "results": rows}
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))
