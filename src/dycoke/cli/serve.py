"""``dycoke serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dycoke.cli import options
from dycoke.cli.console import BadInput, err, out
from dycoke.cli.session import load_assistant

if TYPE_CHECKING:
    from dycoke.serve.app import Server

MIB = 1 << 20
METHOD = "dycoke+"
"""What requests get that name no method, of `dycoke view`, too."""


def serve(
    model: options.Model = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name", help="What requests call the model [default: its folder or id]"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="For requests that name none, see dycoke methods.")
    ] = METHOD,
    retention: options.Retention = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; several are allowed [default: none]"),
    ] = None,
    frames: options.FrameCount = 32,
    max_frames: Annotated[int, typer.Option(min=1, help="Most frames of one video.")] = 512,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of an answer that asks for none.")
    ] = 256,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Most requests that are answered together.")
    ] = 8,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most requests that wait; more are refused with 429.")
    ] = 64,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="MiB of watched videos that are kept; 0 for none.")
    ] = 1024,
    max_video_mb: Annotated[int, typer.Option(min=1, help="MiB of the largest video.")] = 256,
    allowed_local_media_path: Annotated[
        Path | None, typer.Option(help="Folder whose files file: URLs may name [default: none]")
    ] = None,
    allowed_media_domains: Annotated[
        str | None,
        typer.Option(help="Hosts that http URLs may name, comma-separated [default: none]"),
    ] = None,
    fetch_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one fetch.")] = 30.0,
    viewer: Annotated[
        bool, typer.Option("--viewer", help="Serve the page of dycoke view, too.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Serve a model with OpenAI's chat API; compression is chosen per request."""
    needs_extra()
    from dycoke.serve.app import Server, Settings
    from dycoke.serve.media import Policy

    if allowed_local_media_path is not None and not allowed_local_media_path.is_dir():
        raise BadInput(f"--allowed-local-media-path {allowed_local_media_path}: no such folder")
    if api_key and not all(key.strip() for key in api_key):
        raise BadInput("--api-key is empty; give a key, or leave the option out for none")
    if viewer and api_key:
        raise BadInput("--viewer and --api-key: the page sends no key; run one server for each")
    compressor = options.method_of(method, retention, {})
    domains = options.comma_separated(allowed_media_domains or "")

    def make() -> Server:
        settings = Settings(
            name=name or model_name(model),
            compressor=compressor,
            method=None if compressor is None else method,
            keys=tuple(api_key or ()),
            policy=Policy(
                folder=allowed_local_media_path,
                domains=frozenset(domain.lower() for domain in domains),
                max_bytes=max_video_mb * MIB,
                timeout=fetch_timeout,
            ),
            frames=frames,
            max_frames=max(frames, max_frames),
            max_pixels=max_pixels,
            max_tokens=(max_new_tokens, max(max_new_tokens, 4096)),
            max_batch=max_batch,
            max_waiting=max_waiting,
            cache_bytes=cache_mb * MIB,
            threads=max(2, (os.cpu_count() or 2) // 2),
            viewer=viewer,
        )
        return Server(load_assistant(model, device, dtype), settings)

    run(make, host, port)


def needs_extra() -> None:
    """Refuse where what a server needs is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"{' and '.join(missing)} not installed; pip install 'dycoke[serve]' brings what a "
            "server needs"
        )


def model_name(model: str | None) -> str:
    """What requests call a model that was given no name."""
    return Path(model).name if model else "nano"


def run(make: Callable[[], Server], host: str, port: int, opened: bool = False) -> None:
    """Listen until a signal comes; what is under way is finished.

    Parameters
    ----------
    make : loads the model, once the address is known to be free.
    opened : whether a browser is sent to the page.
    """
    import uvicorn

    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise BadInput(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from None
    with listener:
        server = make()
        settings = server.settings
        if host not in ("127.0.0.1", "localhost", "::1") and not settings.keys:
            err.print(f"note: whoever reaches {host} may use this server; --api-key asks for a key")
        url = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        out.print(f"{settings.name} answers at {url}/v1", soft_wrap=True, markup=False)
        if settings.viewer:
            out.print(f"watch it at {url}/", soft_wrap=True, markup=False)
        err.print("press Ctrl+C to stop")
        if opened and not webbrowser.open(f"{url}/"):
            err.print("no browser was found here; open the address in one yourself")
        config = uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=60)
        uvicorn.Server(config).run(sockets=[listener])


def _shown(host: str) -> str:
    """How an address is written in a URL that a browser on this machine can open."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
