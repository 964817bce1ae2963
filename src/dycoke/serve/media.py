"""From an address in a request to bytes: what may be read, and nothing else. No model here.

FFmpeg never gets an address: what is fetched here is written to a file of our own, and a file that
names other files is refused (`dycoke.video.opening`).
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

from dycoke.serve.protocol import ApiError
from dycoke.video import VideoError

PIECE = 1 << 16
PARAM = "messages"


def _public(address: str) -> bool:
    """Whether an address is out in the world: not this machine, its network, or a cloud's own."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is not None:
            return _public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            return _public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        # All that is routed lies here; outside of it are other ways to write an IPv4 address, and
        # site-local ones, which Python calls global.
        if ip not in ipaddress.ip_network("2000::/3"):
            return False
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class Policy:
    """What may be read.

    Attributes
    ----------
    folder : files below it may be named by file: addresses; None for none.
    domains : hosts (of the default port, else "host:port") that http addresses may have.
    max_bytes : of one video or image.
    timeout : seconds for one fetch, all in all.
    redirects : how many are followed; each is checked like the first address.
    public : whether an address that a name leads to may be talked to.
    """

    folder: Path | None = None
    domains: frozenset[str] = frozenset()
    max_bytes: int = 256 << 20
    timeout: float = 30.0
    redirects: int = 0
    public: Callable[[str], bool] = _public


def load(url: str, policy: Policy) -> bytes | Path:
    """The bytes that an address names, or the file.

    Raises
    ------
    ApiError
        400 for what is malformed or not allowed, 413 for what is too large, 422 and 504 for what
        cannot be fetched.
    """
    scheme = url.split(":", 1)[0].lower()
    if scheme == "data":
        return _data(url, policy)
    if scheme == "file":
        return _file(url, policy)
    if scheme in ("http", "https"):
        return _fetched(url, policy)
    raise ApiError(400, f"a URL must be data:, file:, http: or https:, got {url[:40]!r}", PARAM)


def _too_large(policy: Policy) -> ApiError:
    return ApiError(413, f"larger than the limit of {policy.max_bytes} bytes", PARAM)


def _data(url: str, policy: Policy) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise ApiError(400, "a data: URL needs a comma before its data", PARAM)
    if len(data) * 3 // 4 > policy.max_bytes + 3:
        raise _too_large(policy)
    based = head.lower().endswith(";base64")
    try:
        made = base64.b64decode(data, validate=True) if based else unquote_to_bytes(data)
    except ValueError as error:
        what = "base64" if based else "text"
        raise ApiError(400, f"a data: URL with bad {what}: {error}", PARAM) from None
    if len(made) > policy.max_bytes:
        raise _too_large(policy)
    return made


def _file(url: str, policy: Policy) -> Path:
    if policy.folder is None:
        raise ApiError(
            400,
            "file: URLs are off; start the server with --allowed-local-media-path, or send data:",
            PARAM,
        )
    refused = ApiError(400, "that file is not below the allowed folder, or not there", PARAM)
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise refused
        # Where links lead is what counts; nothing is said of files outside, not even that they are.
        path, root = Path(unquote(parts.path)).resolve(strict=True), policy.folder.resolve()
        inside = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not inside:
        raise refused
    if path.stat().st_size > policy.max_bytes:
        raise _too_large(policy)
    return path


def _fetched(url: str, policy: Policy) -> bytes:
    deadline = time.monotonic() + policy.timeout
    for _ in range(policy.redirects + 1):
        answer = _get(url, policy, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise ApiError(400, "the address redirects, which is not followed", PARAM)


def _get(url: str, policy: Policy, deadline: float) -> bytes | str:
    """What an http address holds, or where it leads to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ApiError(400, f"a bad URL: {error}", PARAM) from None
    secure = parts.scheme == "https"
    named = host if port in (None, 443 if secure else 80) else f"{host}:{port}"
    if parts.scheme not in ("http", "https") or parts.username is not None:
        raise ApiError(400, "only plain http and https URLs are fetched", PARAM)
    if named not in policy.domains:
        raise ApiError(
            400,
            f"{named!r} is no allowed domain; start the server with --allowed-media-domains, or "
            "send data:",
            PARAM,
        )
    port = port or (443 if secure else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(place[4][0]) for place in found]
        if not addresses or not all(map(policy.public, addresses)):
            raise ApiError(400, f"{host!r} leads to an address that is not public", PARAM)
        connection = _Connection(host, port, addresses[0], secure, deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
                return str(answer.getheader("Location"))
            if answer.status != 200:
                raise ApiError(422, f"{host!r} answered {answer.status}", PARAM)
            made = _body(answer, policy)
            if time.monotonic() >= deadline:
                raise TimeoutError
            return made
        finally:
            connection.end()
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            late = f"{host!r} took longer than {policy.timeout:g} s"
            raise ApiError(504, late, PARAM) from None
        raise ApiError(422, f"{host!r} cannot be fetched: {error}", PARAM) from None


def _body(answer: http.client.HTTPResponse, policy: Policy) -> bytes:
    made = io.BytesIO()
    while piece := answer.read1(PIECE):
        made.write(piece)
        if made.tell() > policy.max_bytes:
            raise _too_large(policy)
    return made.getvalue()


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was looked up before, by the name it was looked up for.

    At the deadline it is cut, however slowly the other side drips; who reads checks the time then.
    """

    def __init__(self, host: str, port: int, address: str, secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._address, self._secure, self._deadline = address, secure, deadline
        self._alarm: threading.Timer | None = None

    def connect(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock: Any = socket.create_connection((self._address, self.port), left)
        self._alarm = threading.Timer(self._deadline - time.monotonic(), _cut, [sock])
        self._alarm.daemon = True
        self._alarm.start()
        if self._secure:
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self.host)
        self.sock = sock

    def end(self) -> None:
        """Close, and need no deadline any more; `close` itself comes before the body is read."""
        if self._alarm is not None:
            self._alarm.cancel()
        self.close()


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def on_disk(data: bytes | Path, name: str) -> Iterator[Path]:
    """The file of a video, for as long as it is read.

    Parameters
    ----------
    data : its bytes, or where it is.
    name : what messages call it.

    Raises
    ------
    ApiError
        422 for a `VideoError` inside the block.
    """
    with ExitStack() as stack:
        path = data if isinstance(data, Path) else None
        if isinstance(data, bytes):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dycoke-"))
            path = Path(folder) / "clip"
            path.write_bytes(data)
        assert path is not None
        try:
            yield path
        except VideoError as error:
            why = str(error).replace(repr(str(path)), name).replace(str(path), name)
            raise ApiError(422, why, PARAM, "unreadable_video") from None


def as_image(data: bytes | Path) -> Any:
    """An image of Pillow, upright, in RGB.

    Raises
    ------
    ApiError
        422 where it is none, or has more than 2 ** 26 pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            if image.width * image.height > 1 << 26:
                raise ApiError(422, f"an image of {image.width} x {image.height} pixels", PARAM)
            return ImageOps.exif_transpose(image).convert("RGB")
    except ApiError:
        raise
    except UnidentifiedImageError:  # its message names an object of ours
        raise ApiError(422, "not a readable image, of an unknown kind or cut off", PARAM) from None
    except Exception as error:  # Pillow raises what its plug-ins do
        raise ApiError(422, f"not a readable image: {error}", PARAM) from None
