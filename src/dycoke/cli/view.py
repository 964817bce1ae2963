"""``dycoke view``: a page that shows what a model looks at while it answers."""

from __future__ import annotations

from typing import Annotated

import typer

from dycoke.cli import options
from dycoke.cli.console import BadInput, err, out
from dycoke.cli.session import load_assistant

MISSING = "dycoke view needs a web server; install it with: pip install 'dycoke[serve]'"


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
    import socket

    try:
        import uvicorn

        from dycoke.serve.viewer import Viewer
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("uvicorn", "starlette"):
            raise
        raise BadInput(MISSING) from None
    try:
        listener = socket.create_server((host, port))  # before the model, which takes longer
    except OSError as error:
        raise BadInput(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
    with listener:
        viewer = Viewer(load_assistant(model, device, dtype, own_world=True), model or "nano")
        url = f"http://{_shown(host)}:{listener.getsockname()[1]}/"
        out.print(f"watch it at {url}", soft_wrap=True, markup=False)
        err.print("press Ctrl+C to stop")
        if browser:
            _open(url)
        settings = uvicorn.Config(viewer.app(), log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(settings).run(sockets=[listener])


def _shown(host: str) -> str:
    """How an address is written in a URL that a browser on this machine can open."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _open(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        err.print("no browser was found here; open the address in one yourself")
