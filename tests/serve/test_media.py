"""Nothing is read that was not allowed."""

from __future__ import annotations

import base64
import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dycoke.serve import media
from dycoke.serve.media import Policy, load
from dycoke.serve.protocol import ApiError

POLICY = Policy(max_bytes=1000, timeout=2)


def refused(url: str, policy: Policy = POLICY) -> ApiError:
    with pytest.raises(ApiError) as caught:
        load(url, policy)
    return caught.value


# -- data:


@given(st.binary(max_size=1000))
def test_data_comes_back(data: bytes) -> None:
    assert load("data:video/mp4;base64," + base64.b64encode(data).decode(), POLICY) == data
    quoted = "".join(f"%{byte:02x}" for byte in data)
    assert load("data:," + quoted, POLICY) == data


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:video/mp4;base64", 400),
        ("data:,\ud800", 400),
        ("data:;base64,A", 400),
        ("data:;base64,AA==A*", 400),
        ("data:;base64," + "A" * 1400, 413),
        ("data:," + "x" * 1001, 413),
        ("ftp://host/x", 400),
        ("/etc/passwd", 400),
        ("concat:/etc/passwd", 400),
        ("", 400),
    ],
)
def test_bad_addresses(url: str, status: int) -> None:
    assert refused(url).status == status


@given(st.text(max_size=60))
def test_whatever_comes_is_read_or_refused(text: str) -> None:
    for url in (text, f"data:{text}", f"file://{text}", f"http://{text}", f"https://{text}"):
        assert outcome(url) in (200, 400, 413)


def outcome(url: str) -> int:
    try:
        assert isinstance(load(url, POLICY), bytes)
    except ApiError as error:
        return error.status
    return 200


# -- file:


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a b.mp4").write_bytes(b"inside")
    (tmp_path / "in" / "large.mp4").write_bytes(b"x" * 1001)
    (tmp_path / "out.mp4").write_bytes(b"outside")
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (tmp_path / "in" / "deep" / "own.mp4").symlink_to(tmp_path / "in" / "a b.mp4")
    (tmp_path / "in2").mkdir()
    (tmp_path / "in2" / "a.mp4").write_bytes(b"beside")
    return tmp_path


def test_files_below_the_folder_are_read(tree: Path) -> None:
    policy = Policy(folder=tree / "in", max_bytes=1000)
    for name in ("a%20b.mp4", "deep/../a%20b.mp4", "deep/own.mp4"):
        for start in ("file://", "file://localhost", "file:"):
            found = load(f"{start}{tree}/in/{name}", policy)
            assert isinstance(found, Path) and found.read_bytes() == b"inside"
    assert refused(f"file://{tree}/in/large.mp4", policy).status == 413


@pytest.mark.parametrize(
    "name",
    [
        "out.mp4", "in/../out.mp4", "in/%2e%2e/out.mp4", "in/link.mp4", "in2/a.mp4", "in", "none",
        "in/a%00b", "in/deep",
    ],
)  # fmt: skip
def test_no_other_file_is_read(tree: Path, name: str) -> None:
    policy = Policy(folder=tree / "in", max_bytes=1000)
    errors = {str(refused(f"file://{tree}/{name}", policy)) for name in (name, "never-there")}
    assert len(errors) == 1  # what is not allowed looks like what is not there
    assert "are off" in str(refused(f"file://{tree}/in/a%20b.mp4"))
    assert refused(f"file://host{tree}/in/a%20b.mp4", policy).status == 400


# -- http:


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            while True:  # a byte now and then, for ever
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.05)
        size = 5000 if self.path == "/large" else 10
        self.wfile.write(f"{self.headers['Host']}".encode().ljust(size, b"."))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A web server, by a name that leads to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"clips.example:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def names(monkeypatch: Any) -> list[str]:
    """Every name leads to this machine; which were asked for."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(media.socket, "getaddrinfo", look_up)

    def connect(address: Any, timeout: float) -> Any:
        assert address[0] == "127.0.0.1", "a name was looked up again"
        family, kind = socket.AF_INET, socket.SOCK_STREAM
        sock = socket.socket(family, kind)
        sock.settimeout(timeout)
        sock.connect(address)
        return sock

    monkeypatch.setattr(media.socket, "create_connection", connect)
    return asked


def open_to(site: str, **more: Any) -> Policy:
    return Policy(
        domains=frozenset({site}), max_bytes=1000, public=lambda _: True, **{"timeout": 2, **more}
    )


def test_an_allowed_site_is_fetched(site: str, names: list[str]) -> None:
    got = load(f"http://{site}/clip.mp4?x=1", open_to(site))
    assert isinstance(got, bytes) and site.encode().startswith(got.rstrip(b"."))
    assert names == ["clips.example"]  # once: what was checked is what was talked to


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/missing", 422, "answered 404"),
        ("/large", 413, "limit of 1000 bytes"),
        ("/to/http://169.254.169.254/", 400, "redirects"),
    ],
)
def test_what_a_site_may_not_do(
    site: str, names: list[str], path: str, status: int, says: str
) -> None:
    error = refused(f"http://{site}{path}", open_to(site))
    assert (error.status, says in str(error)) == (status, True)


def test_a_site_that_drips_is_cut(site: str, names: list[str]) -> None:
    error = refused(f"http://{site}/slow", open_to(site, timeout=0.4))
    assert (error.status, "longer than 0.4 s" in str(error)) == (504, True)


def test_redirects_are_checked_like_the_first_address(site: str, names: list[str]) -> None:
    policy = open_to(site, redirects=1)
    assert load(f"http://{site}/to/http://{site}/x", policy)
    assert "no allowed domain" in str(refused(f"http://{site}/to/http://other.example/", policy))
    assert refused(f"http://{site}/to/file:///etc/passwd", policy).status == 400
    assert "redirects" in str(refused(f"http://{site}/to/http://{site}/to/http://{site}/", policy))


def test_other_domains_ports_and_users_are_refused(site: str, names: list[str]) -> None:
    for url in (
        "http://clips.example/x",
        f"http://evil.example/{site}",
        f"http://user@{site}/x",
        f"https://{site.split(':')[0]}.evil.example/",
        "http://[::1]/x",
        "http://127.0.0.1/x",
        "http://x:99999/",
    ):
        assert refused(url, open_to(site)).status == 400
    assert names == []  # not even looked up


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::",
        "64:ff9b::7f00:1", "224.0.0.1", "255.255.255.255", "::127.0.0.1", "64:ff9b:1::a00:1",
        "::ffff:0:10.0.0.1", "fec0::1",
    ],
)  # fmt: skip
def test_names_that_lead_inside_are_refused(address: str, monkeypatch: Any) -> None:
    def look_up(host: str, port: int, **_: Any) -> Any:
        return [(0, 0, 0, "", (place, port)) for place in ("93.184.215.14", address)]

    monkeypatch.setattr(media.socket, "getaddrinfo", look_up)
    error = refused("http://clips.example/x", Policy(domains=frozenset({"clips.example"})))
    assert "not public" in str(error)
    assert not media._public(address) and media._public("93.184.215.14")
    assert media._public("2606:2800:21f::1") and media._public("64:ff9b::5db8:d70e")


# -- images


def test_images(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (3, 2)).save(file, "PNG")
    image = media.as_image(file.getvalue())
    assert (image.size, image.mode) == ((3, 2), "RGB")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    assert media.as_image(tmp_path / "x.png").size == (3, 2)
    for data in (b"", b"no image", file.getvalue()[:30]):
        with pytest.raises(ApiError) as caught:
            media.as_image(data)
        assert caught.value.status == 422


def test_what_is_no_image_is_said_without_our_objects() -> None:
    with pytest.raises(ApiError) as caught:
        media.as_image(b"<svg/>")
    assert caught.value.status == 422 and "object" not in str(caught.value)
