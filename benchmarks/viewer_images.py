"""Pictures of the page of ``dycoke view``: a screenshot, and an animation of an answer.

    python benchmarks/viewer_images.py --screenshot docs/images/viewer.png \
        --animation docs/images/viewer.webp

Needs ``dycoke[serve]``, playwright and a Chromium. The embedded model answers, so that every run
gives the same words; how long they take is in the pictures, and is no measurement.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dycoke.assistant import Assistant
from dycoke.serve.app import Server, Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STORY = 3  # attention moves through all its frames, and tokens come back at every turn
WIDTH, HEIGHT = 1120, 640
A_WORD, THE_END = 420, 2400  # milliseconds
# The animation shows the answer and its frames, without the form above them.
ANSWER_ALONE = """
header, form, .head, .truth, .scrub, .keys { display: none !important; }
main { padding: 20px 28px !important; } #panes { margin-top: 0 !important; }
.words { min-height: 72px !important; }
"""


@contextmanager
def served() -> Iterator[str]:
    """The page on a free port of this machine."""
    server = Server(Assistant.load(device="cpu"), Settings(viewer=True))
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            running.should_exit = True
            thread.join()


def answered(page: Page, url: str) -> None:
    """Ask about the story, and wait for the whole answer."""
    page.goto(url)
    page.click(f".clip[data-seed='{STORY}']")
    page.click("#go")
    page.wait_for_selector(".pane[data-done=yes]")


def choose(page: Page, word: int) -> None:
    page.dispatch_event(f".words [data-index='{word}']", "click")


def screenshot(page: Page, url: str, path: Path) -> None:
    """The whole page, at a word where tokens come back."""
    answered(page, url)
    choose(page, 11)
    Image.open(io.BytesIO(page.screenshot(full_page=True))).save(path, optimize=True)


def animation(page: Page, url: str, path: Path) -> None:
    """The answer, word by word."""
    answered(page, url)
    page.add_style_tag(content=ANSWER_ALONE)
    count = int(page.get_attribute(".pane input[type=range]", "max") or 0)
    frames = []
    for word in range(count):  # the end itself is a word without text
        choose(page, word)
        frames.append(Image.open(io.BytesIO(page.locator("main").screenshot())).convert("RGB"))
    times = [A_WORD] * (len(frames) - 1) + [THE_END]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70, method=4
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--animation", type=Path, help="a .webp file")
    parser.add_argument("--scheme", choices=("light", "dark"), default="dark")
    args = parser.parse_args()
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        parser.error(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    work: list[tuple[Any, Path]] = [
        (make, path)
        for make, path in ((screenshot, args.screenshot), (animation, args.animation))
        if path is not None
    ]
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        for make, path in work:
            page = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT},
                color_scheme=args.scheme,
                bypass_csp=True,  # for the animation's own style
            )
            make(page, url, path)
            print(f"{path}: {path.stat().st_size} bytes")
        browser.close()


if __name__ == "__main__":
    main()
