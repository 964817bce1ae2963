"""``dycoke serve``: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dycoke.cli import options
from dycoke.cli.console import BadInput, err
from dycoke.cli.session import load_assistant

if TYPE_CHECKING:
    from dycoke.serve.app import Server

MIB = 1 << 20


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
    ] = "dycoke+",
    retention: options.Retention = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; several are allowed [default: none]"),
    ] = None,
    frames: options.FrameCount = 32,
    max_frames: Annotated[int, typer.Option(min=1, help="Most frames of one video.")] = 512,
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
    viewer: Annotated[
        bool, typer.Option("--viewer", help="Also the page of dycoke view, at /.")
    ] = False,
    fetch_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one fetch.")] = 30.0,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16 [default: by device]")] = None,
) -> None:
    """Serve a model with OpenAI's chat API; compression is chosen per request."""
    needs_extra()
    from dycoke.serve.app import Settings
    from dycoke.serve.media import Policy

    if viewer and api_key:
        raise BadInput("--viewer and --api-key exclude each other: the page has no key; drop one")
    if allowed_local_media_path is not None and not allowed_local_media_path.is_dir():
        raise BadInput(f"--allowed-local-media-path {allowed_local_media_path}: no such folder")
    domains = options.comma_separated(allowed_media_domains or "")
    server = build(
        model,
        device,
        dtype,
        Settings(
            name=name or (Path(model).name if model else "nano"),
            compressor=options.method_of(method, retention, {}),
            keys=tuple(api_key or ()),
            policy=Policy(
                folder=allowed_local_media_path,
                domains=frozenset(domain.lower() for domain in domains),
                max_bytes=max_video_mb * MIB,
                timeout=fetch_timeout,
            ),
            frames=frames,
            max_frames=max(frames, max_frames),
            max_tokens=(max_new_tokens, max(max_new_tokens, 4096)),
            max_batch=max_batch,
            max_waiting=max_waiting,
            cache_bytes=cache_mb * MIB,
            threads=max(2, (os.cpu_count() or 2) // 2),
        ),
    )
    run(server, host, port, viewer)


def needs_extra() -> None:
    """Refuse where what a server needs is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"{' and '.join(missing)} not installed: pip install 'dycoke[serve]' brings what a "
            "server needs"
        )


def build(
    model: str | None, device: str | None, dtype: str | None, settings: Any, own_world: bool = False
) -> Server:
    """The server of a model; ``own_world`` where the embedded one is at home."""
    from dycoke.serve.app import Server

    return Server(load_assistant(model, device, dtype, own_world), settings)


def run(server: Server, host: str, port: int, page: bool = False, browser: bool = False) -> None:
    """Listen until a signal comes; what is under way is finished.

    ``page`` adds the page of ``dycoke view``, which ``browser`` opens.
    """
    import uvicorn

    public = host not in ("127.0.0.1", "localhost", "::1")
    if public and not server.settings.keys:
        err.print(f"note: whoever reaches {host} may use this server; --api-key asks for a key")
    config = uvicorn.Config(server.app, host=host, port=port, log_level="warning")
    sockets = []
    try:
        sockets.append(config.bind_socket())
    except SystemExit:
        server.stop()
        raise BadInput(f"cannot listen on {host}:{port}; is another server there?") from None
    port = sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    err.print(f"dycoke serves {server.settings.name} at http://{shown}:{port}/v1", markup=False)
    if page:
        from dycoke.serve.viewer import Viewer

        Viewer(server)
        own = "127.0.0.1" if host in ("0.0.0.0", "::") else shown
        err.print(f"its page is http://{own}:{port}/", markup=False)
        if browser:
            _open(f"http://{own}:{port}/")
    uvicorn.Server(config).run(sockets)


def _open(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        err.print("no browser was found here; open the address in one yourself")
