"""The page in a real browser: what it draws, how it is used, and what it never does."""

from __future__ import annotations

import base64
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from viewing import Served

from dycoke.methods import create
from dycoke.nano import stories
from dycoke.video import read

pytestmark = [pytest.mark.browser, pytest.mark.once]

STORY = 3  # the first that the page offers
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
ACTIVE, RECALLED, DARK = (0xF5, 0xA5, 0x24), (0x38, 0xA3, 0xF5), (0x15, 0x18, 0x1D)
ANSWERED = ".pane[data-done=yes]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; CHROMIUM names one that is not on the path."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET.split())
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and all that it asked for or complained of."""

    page: Any
    requests: list[str]
    complaints: list[str]

    def ask(self) -> None:
        self.page.click("#go")
        self.page.wait_for_selector(ANSWERED)

    def word(self) -> int:
        """Which word is shown, by the slider; the highlight is on the same."""
        shown = int(self.page.input_value(".pane input[type=range]"))
        marked = self.page.eval_on_selector_all(
            ".pane:first-child .words .on", "found => found.map(e => +e.dataset.index)"
        )
        assert marked == [shown]
        return shown

    def pixel(self, frame: int, x: int, y: int) -> tuple[int, int, int]:
        colour = self.page.evaluate(
            "([f, x, y]) => [...document.querySelectorAll('.pane:first-child .frames canvas')[f]"
            ".getContext('2d').getImageData(x, y, 1, 1).data]",
            [frame, x, y],
        )
        return colour[0], colour[1], colour[2]


@pytest.fixture
def opened(browser: Any, served: Served, request: Any) -> Iterator[Opened]:
    """The page, of the size and scheme of the test's parameter; it ends without a complaint."""
    how = getattr(request, "param", {})
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **how})
    page.set_default_timeout(30_000)
    it = Opened(page, [], [])
    page.on("request", lambda r: it.requests.append(r.url))
    page.on("pageerror", lambda error: it.complaints.append(str(error)))
    page.on("console", lambda m: it.complaints.append(m.text) if m.type == "error" else None)
    page.goto(served.url)
    page.wait_for_selector(".clip:nth-child(6) img")
    yield it
    page.close()
    allowed = (served.url, "data:image/jpeg;base64,")
    assert [url for url in it.requests if not url.startswith(allowed)] == []
    assert it.complaints == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "my clip & more.mp4"
    return stories.write(stories.make("seen", STORY), path)


def test_a_token_has_the_colour_of_what_became_of_it(
    opened: Opened, served: Served, clip: Path
) -> None:
    """Each of several words, against what `ask` says of the same clip."""
    video = read(clip, 24)
    answer = served.viewer.assistant.ask(
        video, stories.DESCRIBE[0], create("dycoke+"), max_new_tokens=128, trace=True
    )
    sample = answer.trace.samples[0]
    places = sample.keep[0].flatten().nonzero()[:, 0].tolist()
    opened.ask()
    for index in (2, 9, 20):
        active, before = sample.active[index - 1], sample.active[index - 2]
        opened.page.locator(".pane input[type=range]").fill(str(index))
        recalled = (active & ~before).nonzero()[:, 0].tolist()
        stayed = (active & before).nonzero()[:, 0].tolist()
        banked = (~active).nonzero()[:, 0].tolist()
        merged = (~sample.keep[0].flatten()).nonzero()[:, 0].tolist()
        assert recalled and stayed and banked and merged
        for place in [places[v] for v in recalled[:4]]:
            assert opened.pixel(*edge(place)) == RECALLED
        for place in [places[v] for v in stayed[:4]]:
            assert opened.pixel(*edge(place)) == ACTIVE
        for place in merged[::150]:
            frame, x, y = edge(place)
            mixed = [0.86 * d + 0.14 * p for d, p in zip(DARK, shown(video, place), strict=True)]
            # The picture came as JPEG, and was enlarged.
            assert opened.pixel(frame, x + 13, y) == pytest.approx(mixed, abs=12)
        for place in [places[v] for v in banked[::80]]:
            frame, x, y = edge(place)
            mixed = [0.42 * d + 0.58 * p for d, p in zip(DARK, shown(video, place), strict=True)]
            assert opened.pixel(frame, x + 13, y) == pytest.approx(mixed, abs=40)
        counts = (
            opened.page.inner_text("[data-n=active]"),
            opened.page.inner_text("[data-n=recalled]"),
        )
        assert counts == (f"{int(active.sum())} of 864", str(len(recalled)))


def edge(place: int) -> tuple[int, int, int]:
    """Frame and pixel of a token's left edge, halfway down: 36 tokens of 32 pixels a frame."""
    frame, cell = divmod(place, 36)
    return frame, cell % 6 * 32 + 3, cell // 6 * 32 + 16


def shown(video: Any, place: int) -> list[float]:
    """The middle of a token in the clip: 16 pixels wide there."""
    frame, cell = divmod(place, 36)
    y, x = cell // 6 * 16 + 8, cell % 6 * 16 + 8
    return list(video.frames[frame][y - 1 : y + 1, x - 1 : x + 1].mean((0, 1)))


def test_words_slider_strip_and_keys_choose_the_same_step(opened: Opened) -> None:
    opened.ask()
    page = opened.page
    assert opened.word() == 25
    page.hover(".words span:nth-child(9)")
    assert opened.word() == 8 and page.inner_text("output") == "word 9 of 26"
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert opened.word() == 9
    page.keyboard.press("Home")
    assert opened.word() == 0
    box = page.locator(".strip").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 4.5 / 26, box["y"] + 40)
    assert opened.word() == 4
    page.locator("body").press("ArrowLeft")
    assert opened.word() == 3
    said = page.locator("input[type=range]").get_attribute("aria-valuetext")
    assert said.startswith("Word 4, moves: attends to 118 tokens, ") and said.endswith("seconds.")
    page.locator("body").press("End")
    page.locator("body").press(" ")
    page.wait_for_selector(".play[aria-label=Pause]")
    page.wait_for_selector(".words .on:not([data-index='0'], [data-index='25'])")
    page.click(".play")
    assert page.locator(".play").get_attribute("aria-label") == "Replay"


def test_the_strip_is_darkest_where_a_word_looked(
    opened: Opened, served: Served, clip: Path
) -> None:
    answer = served.viewer.assistant.ask(
        read(clip, 24), stories.DESCRIBE[0], create("dycoke+"), max_new_tokens=128, trace=True
    )
    sample = answer.trace.samples[0]
    owner = sample.keep[0].nonzero()[:, 0]
    opened.ask()
    for index in (5, 12, 22):
        mass = torch.zeros(24).index_add_(0, owner, sample.attention[index - 1].float())
        alpha = opened.page.evaluate(
            "([i]) => { const c = document.querySelector('.strip'), p = c.getContext('2d');"
            "return [...Array(24).keys()].map(f => p.getImageData(Math.floor((i + .5) * c.width"
            " / 26), Math.floor((f + .5) * c.height / 24), 1, 1).data[3]) }",
            [index],
        )
        assert alpha.index(max(alpha)) == int(mass.argmax()) and max(alpha) == 255
        top = opened.page
        top.locator(".pane input[type=range]").fill(str(index))
        assert top.eval_on_selector_all(
            "figure", "all => all.findIndex(f => f.classList.contains('top'))"
        ) == int(mass.argmax())


def drop(opened: Opened, name: str, data: bytes) -> None:
    opened.page.evaluate(
        "([name, data]) => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)),"
        " given = new DataTransfer(); given.items.add(new File([bytes], name));"
        " for (const kind of ['dragover', 'drop']) document.getElementById('drop').dispatchEvent("
        " new DragEvent(kind, {dataTransfer: given, bubbles: true, cancelable: true})) }",
        [name, base64.b64encode(data).decode()],
    )


def test_a_dropped_clip_is_answered(opened: Opened, clip: Path) -> None:
    drop(opened, clip.name, clip.read_bytes())
    assert opened.page.inner_text("#chosen") == clip.name
    opened.ask()
    assert opened.page.inner_text(".words") == stories.describe(stories.make("seen", STORY))
    assert opened.page.locator("figure").count() == 24
    assert opened.page.locator(".truth").is_hidden()  # nobody knows it of a clip


def test_frames_of_several_clips_are_shown(opened: Opened, served: Served, clip: Path) -> None:
    """Under their names, each token in its own clip's frame."""
    page, second = opened.page, clip.with_name("second.mp4")
    stories.write(stories.make("seen", 18), second)
    page.set_input_files("#file", [clip, second])
    assert page.inner_text("#chosen") == f"{clip.name}, second.mp4"
    page.select_option("#method", "dycoke")
    opened.ask()
    titles = page.locator(".frames h3").all_inner_texts()
    assert titles == [f"Clip 1: {clip.name}", "Clip 2: second.mp4"]
    assert page.locator("figure").count() == 48
    assert page.inner_text("[data-n=tokens]") == "1728"
    inputs = served.viewer.assistant.prepare_chat(
        [{"role": "user", "content": [{"type": "video"}] * 2 + [{"type": "text", "text": "x"}]}],
        [read(clip, 24), read(second, 24)],
    )
    model, steps = served.viewer.assistant.model, list[Any]()
    with create("dycoke")(model, on_step=steps.append):
        model.generate(**inputs, max_new_tokens=1)
    page.locator(".pane input[type=range]").fill("0")
    for video, masks in enumerate(steps[0].videos[0]):
        kept = masks.keep.flatten()
        counts = page.locator("figure canvas").evaluate_all(
            "all => all.map(c => +c.getAttribute('aria-label').match(/: (\\d+) tokens kept/)[1])"
        )
        assert counts[24 * video : 24 * video + 24] == kept.view(24, 36).sum(1).tolist()
    label = page.locator("figure canvas").last.get_attribute("aria-label")
    assert label.startswith("Frame at clip 2, ")


def test_a_file_that_is_no_clip_gets_a_message(opened: Opened, clip: Path) -> None:
    page = opened.page
    drop(opened, "<b>notes.txt", b"these are notes, not a video")
    page.click("#go")
    page.wait_for_selector("#message:not([hidden])")
    message = page.inner_text("#message")
    assert "<b>notes.txt" in message  # as text, never as markup
    assert page.locator("#message b").count() == 0
    assert page.inner_text(".words") == "no answer"
    # The browser itself writes refused requests to its console.
    assert all("422" in line for line in opened.complaints)
    opened.complaints.clear()
    drop(opened, "large.mp4", bytes((1 << 20) + 1))
    page.click("#go")
    assert page.inner_text("#message") == "The clip is larger than 1 MiB."
    page.set_input_files("#file", clip)
    assert page.locator("#message").is_hidden()
    opened.ask()
    assert page.inner_text(".words").startswith("an orange cross moves up")


def test_an_answer_that_is_stopped_ends_there(
    opened: Opened, served: Served, monkeypatch: Any
) -> None:
    gate, told, ended = threading.Semaphore(4), [], threading.Event()
    inner, answer = served.viewer._generate, served.viewer._answer

    def slowly(asked: Any, videos: Any, on_step: Any) -> Any:
        def step(one: Any) -> None:
            gate.acquire(timeout=30)
            told.append(one.index)
            on_step(one)

        return inner(asked, videos, step)

    def watched(*args: Any) -> None:
        answer(*args)
        ended.set()

    monkeypatch.setattr(served.viewer, "_generate", slowly)
    monkeypatch.setattr(served.viewer, "_answer", watched)
    page = opened.page
    page.click("#go")
    page.wait_for_selector(".words [data-index='2']")
    assert page.inner_text(".words") == "an orange cross"  # a word is there while more come
    page.click("#stop")
    page.wait_for_selector(".pane[data-done=stopped]")
    assert page.inner_text(".words") == "an orange cross stopped"
    while not ended.wait(0.6):  # a connection is looked at twice a second
        gate.release()
    assert len(told) < 15  # of 26
    monkeypatch.undo()
    opened.ask()
    assert page.locator(".words [data-index]").count() == 26


def test_a_stream_that_breaks_off_says_so(opened: Opened) -> None:
    page = opened.page
    page.route("**/viewer/ask?*", lambda route: route.fulfill(body=""))
    page.click("#go")
    page.wait_for_selector("#message:not([hidden])")
    assert page.inner_text("#message") == "The answer broke off: the connection was lost."
    page.unroute("**/viewer/ask?*")
    page.route("**/viewer/ask?*", lambda route: route.abort())
    page.click("#go")
    page.wait_for_selector("#message:has-text('The server does not answer.')")
    opened.complaints.clear()  # the browser's own line about it


def test_side_by_side_with_the_full_model(opened: Opened) -> None:
    opened.ask()
    page = opened.page
    page.click(".compare")
    page.wait_for_selector(f"{ANSWERED}:nth-child(2)")
    assert page.locator(".pane").count() == 2 and page.locator(".compare:visible").count() == 0
    active, kept = (
        page.locator(f"[data-n={name}]").all_inner_texts() for name in ("active", "kept")
    )
    assert active == ["118 of 864", "864 of 864"] and kept == ["396 of 864", "864 of 864"]
    held = page.locator("[data-n=kv]").all_inner_texts()
    assert held[0].endswith(f"of {held[1]}") and len(set(held)) == 2
    page.hover(".pane:nth-child(2) .words span:nth-child(5)")
    assert page.locator("output").all_inner_texts() == ["word 5 of 26"] * 2
    opened.ask()  # a new question begins anew
    assert page.locator(".pane").count() == 1


def test_tokens_that_the_encoder_never_computed_are_hatched(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#skipped").is_hidden()
    page.click("summary")
    page.fill("#skip_ratio", "0.5")
    page.select_option("#method", "dycoke")
    opened.ask()
    assert page.locator("#skipped").is_visible()
    assert page.inner_text("h2") == "dycoke, skip_ratio 0.5"
    hatched = {opened.pixel(1, x, 16) for x in range(192)}
    assert any(abs(r - 0x4A) + abs(g - 0x51) + abs(b - 0x5C) < 12 for r, g, b in hatched)


SIZES = [
    {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for width in (390, 820, 1440)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("opened", SIZES, indirect=True)
def test_every_width_and_scheme(opened: Opened) -> None:
    """Nothing runs out of the window, and text stands out from what is behind it."""
    page = opened.page
    opened.ask()
    page.click(".compare")
    page.wait_for_selector(f"{ANSWERED}:nth-child(2)")
    wide = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
    assert page.evaluate(wide) == 0
    for selector in ("body", ".truth", "dt", ".counts .a dd", ".counts .r dd", ".words .on", "#go"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    assert page.evaluate(UNNAMED) == []


# What a screen reader would have no name for.
UNNAMED = """[...document.querySelectorAll("canvas, img, button, input, select")]
  .filter((e) => !e.closest("[hidden]"))
  .filter((e) => !e.getAttribute("aria-label") && e.getAttribute("alt") === null)
  .filter((e) => !e.textContent.trim() && !e.labels?.length && !e.querySelector("img[alt]"))
  .map((e) => e.outerHTML)"""

# The contrast of WCAG 2 between an element's text and the nearest background behind it.
CONTRAST = """(selector) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map((c) => {
      c /= 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let back = element;
  while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
  const text = light(getComputedStyle(element).color);
  const behind = light(getComputedStyle(back).backgroundColor);
  return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
}"""
