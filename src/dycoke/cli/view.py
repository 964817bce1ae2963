"""``dycoke view``: a page that shows what a model looks at while it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dycoke.cli import options
from dycoke.cli import serve as server


def view(
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    frames: options.FrameCount = 32,
    max_video_mb: Annotated[int, typer.Option(min=1, help="MiB of the largest video.")] = 256,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16 [default: by device]")] = None,
) -> None:
    """Watch a model answer: what it keeps, looks at, and brings back at each word."""
    server.needs_extra()
    from dycoke.serve.app import Settings
    from dycoke.serve.media import Policy

    settings = Settings(
        name=Path(model).name if model else "nano",
        policy=Policy(max_bytes=max_video_mb * server.MIB),
        frames=frames,
        cache_bytes=0,  # what is watched step by step is never one of the kept videos
    )
    built = server.build(model, device, dtype, settings, own_world=True)
    server.run(built, host, port, page=True, browser=browser)
