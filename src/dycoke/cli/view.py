"""``dycoke view``: a page that shows what a model looks at while it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dycoke.cli import options
from dycoke.cli.serve import METHOD, model_name, needs_extra, run
from dycoke.cli.session import load_assistant

if TYPE_CHECKING:
    from dycoke.serve.app import Server


def view(
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16 [default: by device]")] = None,
) -> None:
    """Watch a video model answer: what it keeps, looks at, and brings back at each word."""
    needs_extra()

    def make() -> Server:
        from dycoke.serve.app import Server, Settings

        settings = Settings(
            name=model_name(model),
            compressor=options.method_of(METHOD, None, {}),
            method=METHOD,
            viewer=True,
        )
        return Server(load_assistant(model, device, dtype, own_world=True), settings)

    run(make, host, port, opened=browser)
