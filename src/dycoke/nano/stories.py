"""StoryQA: short clips of moving shapes, their exact truth, questions about them, and scoring.

A story is one to four events in sequence, each a coloured shape that does something, on a
textured and noisy background under a slightly shaking camera; half of the stories also hold a
shape that stays still from the first frame to the last. To tell a story, a model must look at
other frames with every clause. Every random choice follows from the split and one seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ACTIONS",
    "COLOURS",
    "DESCRIBE",
    "FPS",
    "FRAMES",
    "MAX_EVENTS",
    "SHAPES",
    "SIZE",
    "SPLITS",
    "WORDS",
    "Event",
    "Split",
    "Sprite",
    "Still",
    "Story",
    "describe",
    "events_right",
    "is_unseen",
    "make",
    "parse",
    "questions",
    "render",
    "same_answer",
    "tracks",
    "write",
]

Floats = NDArray[np.floating]
Split = Literal["train", "seen", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Training; held-out stories of known combinations; stories of combinations never trained on."""

SIZE = 96
"""Side of a frame, in pixels."""
FRAMES = 24
"""Frames of a story, unless asked otherwise."""
FPS = 8
"""Frame rate of a written clip."""
MAX_EVENTS = 4
SHORTEST = 3  # frames; fewer would not tell blinking from vanishing
ZOOM = (0.8, 1.8)  # how far the training stories are seen from, times the others' size

PALETTE = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 75, 220),
    "yellow": (232, 215, 45),
    "purple": (150, 55, 190),
    "orange": (240, 135, 25),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = (
    *(f"moves {way}" for way in DIRECTIONS),
    "grows",
    "shrinks",
    "blinks",
    "turns",
    "crosses",
)
"""What a shape can do; "turns" takes a colour after it, "crosses" a coloured shape."""

ORDINALS = ("first", "second", "third", "fourth")
NUMBERS = ("one", "two", "three", "four")
DESCRIBE = (
    "Describe what happens in this video.",
    "Describe the video.",
    "What happens in this video?",
)
"""Ways to ask for the whole story; the first is the one that the benchmark uses."""

_TELLING = """a an then the what which how many color colour shape thing things is are does do there
stays still nothing comes or event events happen happens describe video clip in this story tell me
about please of and it to"""
WORDS = tuple(
    dict.fromkeys(
        [*COLOURS, *SHAPES, *" ".join(ACTIONS).split(), *ORDINALS, *NUMBERS, *_TELLING.split()]
    )
)
"""The closed vocabulary of stories, questions and answers, without punctuation."""


@dataclass(frozen=True)
class Still:
    """A shape that does not move. Centre and radius are in pixels, x to the right, y down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """One shape doing one thing in frames ``start <= i < stop``, where alone it is seen.

    ``begin`` and ``end`` are (x, y, radius) in pixels at its first and last frame. ``into`` is
    the new colour of a shape that turns, ``other`` what is crossed.
    """

    colour: str
    shape: str
    action: str
    start: int
    stop: int
    begin: tuple[float, float, float]
    end: tuple[float, float, float]
    into: str = ""
    other: Still | None = None

    @property
    def does(self) -> str:
        """The action in full: "moves left", "turns blue", "crosses a green square"."""
        return f"{self.action} {self.other or self.into}".rstrip()

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape} {self.does}"


@dataclass(frozen=True)
class Story:
    """What happens in one clip. The picture follows from it: see :func:`render`."""

    split: Split
    seed: int
    frames: int
    events: tuple[Event, ...]
    distractor: Still | None


@dataclass(frozen=True)
class Sprite:
    """One shape of one colour over the frames in which it is drawn, without camera shake.

    ``frames`` are indices, shape (k,); ``x``, ``y`` and ``radius`` are pixels, shape (k,).
    """

    colour: str
    shape: str
    frames: NDArray[np.intp]
    x: Floats
    y: Floats
    radius: Floats


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _rng(split: Split, seed: int, purpose: int) -> np.random.Generator:
    """Independent streams for content, picture and questions of the same story."""
    return np.random.default_rng([SPLITS.index(split), purpose, seed])


def is_unseen(colour: str, shape: str, action: str) -> bool:
    """Whether training never shows this combination: one colour of eight per shape and action.

    Each colour, shape and action, and each pair of them, still occurs in training often.
    """
    c, s, a = COLOURS.index(colour), SHAPES.index(shape), ACTIONS.index(action)
    return (c + 3 * s + a) % len(COLOURS) == 0


def make(split: Split, seed: int, *, events: int | None = None, frames: int = FRAMES) -> Story:
    """Draw the story number `seed` of `split`.

    Parameters
    ----------
    split : {"train", "seen", "unseen"}
        "train" and "seen" share the kinds of events and no seed; each event of an "unseen" story
        is a colour-shape-action combination that the other two never contain. Training stories
        are seen from nearer and from farther away, 0.8 to 1.8 times the size of the others.
    seed : int
        Any number >= 0.
    events : int, optional
        How many, 1 to 4; drawn by default.
    frames : int
        Length of the clip; at least 3 per event.

    Returns
    -------
    Story
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = _rng(split, seed, 0)
    count = int(rng.integers(1, MAX_EVENTS + 1)) if events is None else events
    if not 1 <= count <= MAX_EVENTS:
        raise ValueError(f"events must be 1 to {MAX_EVENTS}, got {count}")
    if frames < SHORTEST * count:
        raise ValueError(f"{count} events need at least {SHORTEST * count} frames, got {frames}")
    zoom = 1.0
    if split == "train":
        zoom = float(np.exp(_rng(split, seed, 3).uniform(*np.log(ZOOM))))

    shortest = max(SHORTEST, frames // 6)  # longer clips have longer events, not more of them
    spare = rng.multinomial(frames - shortest * count, [1 / count] * count)
    stops = np.cumsum(spare + shortest).tolist()
    taken: set[tuple[str, str]] = set()  # no colour and shape twice: "the red circle" is one thing
    told = []
    for start, stop in zip([0, *stops], stops, strict=False):
        told.append(_event(rng, split == "unseen", taken, start, stop, zoom))
    distractor = _distractor(rng, taken, told, zoom) if rng.random() < 0.5 else None
    return Story(split, seed, frames, tuple(told), distractor)


def _event(
    rng: np.random.Generator,
    unseen: bool,
    taken: set[tuple[str, str]],
    start: int,
    stop: int,
    zoom: float,
) -> Event:
    action = ACTIONS[rng.integers(len(ACTIONS))]
    while True:
        colour, shape = _pick(rng, taken)
        into = COLOURS[rng.integers(len(COLOURS))] if action == "turns" else ""
        clash = into == colour or (into, shape) in taken
        if is_unseen(colour, shape, action) == unseen and not clash:
            break
    taken |= {(colour, shape), (into or colour, shape)}

    way = action.rpartition(" ")[2]
    other = None
    radius = float(rng.uniform(12, 16))
    last = radius
    step = np.zeros(2)
    if action.startswith("moves"):
        step = np.array(DIRECTIONS[way]) * rng.uniform(28, 44)
    elif action == "crosses":
        radius = last = float(rng.uniform(11, 13))
        step = np.array(list(DIRECTIONS.values())[rng.integers(4)]) * rng.uniform(44, 50)
    elif action == "grows":
        radius, last = float(rng.uniform(7, 9)), float(rng.uniform(16, 20))
    elif action == "shrinks":
        radius, last = float(rng.uniform(16, 20)), float(rng.uniform(7, 9))
    radius, last = radius * zoom, last * zoom
    margin = max(radius, last) + 2  # stays inside the picture, shake included
    step = step.clip(2 * margin + 1 - SIZE, SIZE - 2 * margin - 1)
    reach = margin + np.abs(step) / 2
    middle = rng.uniform(reach, SIZE - reach)
    (x0, y0), (x1, y1) = (middle - step / 2).tolist(), (middle + step / 2).tolist()
    if action == "crosses":
        pair = _pick(rng, taken)
        taken.add(pair)
        x, y = middle.tolist()
        other = Still(*pair, x, y, zoom * float(rng.uniform(10, 12)))
    return Event(colour, shape, action, start, stop, (x0, y0, radius), (x1, y1, last), into, other)


def _pick(rng: np.random.Generator, taken: set[tuple[str, str]]) -> tuple[str, str]:
    """A colour and a shape that are not `taken` together."""
    while True:
        pair = COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
        if pair not in taken:
            return pair


def _distractor(
    rng: np.random.Generator, taken: set[tuple[str, str]], events: Sequence[Event], zoom: float
) -> Still:
    """A still shape where the events leave the most room."""
    colour, shape = _pick(rng, taken)
    radius = zoom * float(rng.uniform(10, 13))
    places = rng.uniform(radius + 2, SIZE - radius - 2, (64, 1, 2))
    along = np.linspace(0, 1, 5)[:, None]
    busy = np.concatenate(  # (points, 3): x, y, radius along every path
        [(1 - along) * np.array(e.begin) + along * np.array(e.end) for e in events]
    )
    room = np.linalg.norm(places - busy[:, :2], axis=-1) - busy[:, 2]
    x, y = places[room.min(axis=1).argmax(), 0].tolist()
    return Still(colour, shape, x, y, radius)


def tracks(story: Story) -> list[Sprite]:
    """Every shape of the story over time, in drawing order (later ones cover earlier ones)."""
    sprites = []
    everything = np.arange(story.frames)
    if story.distractor:
        sprites.append(_standing(story.distractor, everything))
    for event in story.events:
        frames = everything[event.start : event.stop]
        if event.other:
            sprites.append(_standing(event.other, frames))
        t = np.linspace(0, 1, len(frames), dtype=np.float32)[:, None]
        x, y, r = ((1 - t) * np.array(event.begin, t.dtype) + t * np.array(event.end, t.dtype)).T
        if event.action == "turns":
            half = len(frames) // 2
            parts = [(event.colour, slice(half)), (event.into, slice(half, None))]
        elif event.action == "blinks":
            beat = max(1, len(frames) // 6)  # slower in a longer event
            parts = [(event.colour, slice(i, i + beat)) for i in range(0, len(frames), 2 * beat)]
        else:
            parts = [(event.colour, slice(None))]
        sprites += [Sprite(c, event.shape, frames[p], x[p], y[p], r[p]) for c, p in parts]
    return sprites


def _standing(still: Still, frames: NDArray[np.intp]) -> Sprite:
    x, y, radius = (np.full(len(frames), v, np.float32) for v in (still.x, still.y, still.radius))
    return Sprite(still.colour, still.shape, frames, x, y, radius)


def render(story: Story) -> NDArray[np.uint8]:
    """Draw the story.

    Returns
    -------
    ndarray
        Pixels, shape (story.frames, 96, 96, 3), RGB.
    """
    rng = _rng(story.split, story.seed, 1)
    # Camera shake: a lazy random walk, in pixels, shape (F, 2).
    shake = np.zeros((story.frames, 2), np.float32)
    for i, push in enumerate(rng.normal(0, 0.5, shake.shape)):
        shake[i] = 0.8 * shake[i - 1] + push
    shake = shake.clip(-2, 2)

    canvas = _background(rng, shake)
    for sprite in tracks(story):
        _draw(canvas, sprite, shake, rng.uniform(0.88, 1.04))
    grain = rng.standard_normal(canvas.shape[:3], np.float32)
    canvas += (rng.uniform(3, 8) * grain)[..., None]
    return (canvas.clip(0, 255) + 0.5).astype(np.uint8)


def _background(rng: np.random.Generator, shake: Floats) -> Floats:
    """A dull plane under a few plane waves, moving with the camera: shape (F, H, W, 3)."""
    waves = 6
    kx, ky = rng.uniform(-1, 1, (2, waves)) * np.geomspace(0.06, 0.9, waves)
    strength = rng.uniform(3, 9, (waves, 1)) * rng.uniform(0.7, 1.3, (waves, 3))
    line = np.arange(SIZE) + 0.5
    # cos(kx x + ky y + p) is the real part of a product, so that one matmul draws all frames.
    right = np.exp(1j * kx * (line - shake[:, :1])[..., None])  # (F, W, waves)
    down = np.exp(1j * (ky * (line - shake[:, 1:])[..., None] + rng.uniform(0, 2 * np.pi, waves)))
    down = np.concatenate([down.real, -down.imag], -1).astype(np.float32)  # (F, H, 2 waves)
    right = np.concatenate([right.real, right.imag], -1).astype(np.float32)
    weights = np.tile(strength, (2, 1)).astype(np.float32)  # (2 waves, 3)
    colour = (right[:, :, None] * weights.T).reshape(len(shake), 3 * SIZE, -1)
    picture = (down @ colour.transpose(0, 2, 1)).reshape(len(shake), SIZE, SIZE, 3)
    base = rng.uniform(60, 130) + rng.uniform(-14, 14, 3)
    return np.asarray(picture + base.astype(np.float32), np.float32)


def _draw(canvas: Floats, sprite: Sprite, shake: Floats, light: float) -> None:
    """Blend one sprite into `canvas` (F, H, W, 3), with edges one pixel soft."""
    if not len(sprite.frames):
        return
    x, y = sprite.x + shake[sprite.frames, 0], sprite.y + shake[sprite.frames, 1]
    margin = sprite.radius.max() + 1
    left, right = (int(np.clip(v, 0, SIZE)) for v in (x.min() - margin, x.max() + margin + 1))
    top, bottom = (int(np.clip(v, 0, SIZE)) for v in (y.min() - margin, y.max() + margin + 1))
    radius = sprite.radius[:, None, None]
    u = (np.arange(left, right, dtype=np.float32) + 0.5 - x[:, None])[:, None] / radius
    v = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y[:, None])[..., None] / radius
    cover = (0.5 - _outside(sprite.shape, u, v) * radius).clip(0, 1)[..., None]
    first = int(sprite.frames[0])
    part = canvas[first : first + len(sprite.frames), top:bottom, left:right]
    paint = (np.array(PALETTE[sprite.colour], np.float32) * np.float32(light)).clip(0, 255)
    part += cover * (paint - part)


def _outside(shape: str, u: Floats, v: Floats) -> Floats:
    """Distance to the outline of a shape of radius 1, negative inside; (k, 1, w), (k, h, 1)."""
    if shape == "circle":
        return np.asarray(np.sqrt(u * u + v * v) - 0.95)
    if shape == "ring":
        return np.asarray(abs(np.sqrt(u * u + v * v) - 0.72) - 0.24)
    if shape == "square":
        return np.asarray(np.maximum(abs(u), abs(v)) - 0.82)
    if shape == "cross":
        wide, high = abs(u), abs(v)
        arm = np.float32(0.3)
        along, upright = np.maximum(wide - 1, high - arm), np.maximum(wide - arm, high - 1)
        return np.asarray(np.minimum(along, upright))
    if shape == "triangle":
        return np.asarray(np.maximum(v - 0.7, 0.866 * abs(u) - 0.5 * v - 0.5))
    if shape == "star":  # five points: fold the plane into one tenth, then one straight edge
        tenth = np.pi / 5
        angle = np.arctan2(u, -v)
        folded = abs((angle + tenth) % (2 * tenth) - tenth)
        distance = np.sqrt(u * u + v * v)
        # The edge runs from the tip at radius 1 to the notch at radius 0.45, a tenth further.
        notch = 0.45 * np.array([np.cos(tenth), np.sin(tenth)])
        normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
        along, across = distance * np.cos(folded), distance * np.sin(folded)
        return np.asarray((along - 1) * normal[0] + across * normal[1], np.float32)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def write(story: Story, path: str | Path) -> Path:
    """Write the story as a video file, 8 frames a second; the ending names the container.

    The same story gives the same bytes, in every run and on every processor.
    """
    import av

    path = Path(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        # At 10 thin shapes and their colours survive. x264's assembler lets what lies in memory
        # decide some blocks, so that two calls give two files; its C code does not.
        stream.options = {"crf": "10", "x264-params": "asm=0:threads=1"}
        for picture in render(story):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def describe(story: Story) -> str:
    """The story told: "a red circle moves left, then a blue square grows"."""
    return ", then ".join(str(event) for event in story.events)


def questions(story: Story) -> list[tuple[str, str]]:
    """Every question about the story with its one right answer, in a fixed order."""
    rng = _rng(story.split, story.seed, 2)
    count = len(story.events)
    asked = []
    for ordinal, event in zip(ORDINALS, story.events, strict=False):
        asked += [
            (f"What colour is the {ordinal} thing?", event.colour),
            (f"What shape is the {ordinal} thing?", event.shape),
            (f"What does the {ordinal} thing do?", event.does),
        ]
    if count > 1:
        pair = rng.choice(count, 2, replace=False)
        one, two = (f"the {story.events[i].colour} {story.events[i].shape}" for i in pair)
        asked.append((f"Which comes first, {one} or {two}?", one if pair[0] < pair[1] else two))
    asked.append(("How many events are there?", NUMBERS[count - 1]))
    asked.append(("What stays still?", str(story.distractor or "nothing")))
    return asked


def same_answer(answer: str, truth: str) -> bool:
    """Exact match of the words, whatever the case, spacing and closing punctuation."""
    return _words(answer) == _words(truth)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


_COLOUR, _SHAPE = (f"(?:{'|'.join(words)})" for words in (COLOURS, SHAPES))
_TOLD = re.compile(
    rf"\b({_COLOUR}) ({_SHAPE}) "
    rf"(moves (?:{'|'.join(DIRECTIONS)})|grows|shrinks|blinks|turns {_COLOUR}"
    rf"|crosses an? {_COLOUR} {_SHAPE})\b"
)


def parse(text: str) -> list[tuple[str, str, str]]:
    """The (colour, shape, what it does) of every whole event told in `text`, in order."""
    return [match.groups() for match in _TOLD.finditer(" ".join(_words(text)))]  # type: ignore[misc]


def events_right(text: str, story: Story) -> int:
    """How many events `text` tells fully right: colour, shape and action, in their order.

    The longest common subsequence of told and true events, so that one event too few does not
    make all later ones wrong; of the told ones only as many count as there are true ones, so
    that telling more does not pay.
    """
    truth = [(e.colour, e.shape, e.does) for e in story.events]
    best = [0] * (len(truth) + 1)
    for said in parse(text)[: len(truth)]:
        before = best[:]
        for i, true in enumerate(truth):
            best[i + 1] = before[i] + 1 if said == true else max(best[i], before[i + 1])
    return best[-1]
