"""Does the model look at the event that it is telling? The paper's observation, as a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dycoke.assistant import Assistant
from dycoke.methods.dycoke import DyCoke
from dycoke.nano import stories
from dycoke.picture import attention_by_frame
from dycoke.video import Video

# Articles, commas and "then" belong to no frame.
CONTENT = {
    *stories.COLOURS,
    *stories.SHAPES,
    *stories.DIRECTIONS,
    *(action.split()[0] for action in stories.ACTIONS),
}


@dataclass(frozen=True)
class Looking:
    """Words told, those whose most attended frame lies in their event, and chance's share."""

    stories: int
    words: int
    inside: int
    chance: float


def told_events(tokens: Sequence[str]) -> list[int | None]:
    """Which event each generated token belongs to; None for words that tell nothing."""
    owners: list[int | None] = []
    event = 0
    for token in tokens:
        event += token == "then"
        owners.append(event if token in CONTENT else None)
    return owners


def clip_of(story: stories.Story) -> Video:
    """A story as a clip, without the way through a file."""
    frames = stories.render(story)
    count, fps = len(frames), float(stories.FPS)
    times = tuple(i / fps for i in range(count))
    return Video(frames, tuple(range(count)), times, count, fps, f"story {story.seed}")


def looking(
    assistant: Assistant, split: str, first: int, count: int, prune_layer: int = 3
) -> Looking:
    """Trace the full model while it tells stories.

    Attention is read where DyCoke reads it, in layer ``prune_layer`` - 1.
    """
    words = inside = 0
    chance = 0.0
    nothing = DyCoke(merge_ratio=0, prune_ratio=0, prune_layer=prune_layer)
    for seed in range(first, first + count):
        story = stories.make(split, seed)  # type: ignore[arg-type]
        answer = assistant.ask(
            clip_of(story), stories.DESCRIBE[0], nothing, max_new_tokens=64, trace=True
        )
        assert answer.trace is not None
        top = attention_by_frame(answer.trace.samples[0]).argmax(1)
        # Step i feeds token i and writes token i + 1; the first token has no trace.
        for owner, frame in zip(told_events(answer.tokens)[1:], top, strict=False):
            if owner is not None and owner < len(story.events):
                event = story.events[owner]
                words += 1
                inside += bool(event.start <= frame < event.stop)
                chance += (event.stop - event.start) / story.frames
    return Looking(count, words, inside, chance / words if words else 0.0)
