"""The embedded model must still answer right, full and compressed, all the way from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dycoke import DyCoke, nano
from dycoke.assistant import Assistant
from dycoke.nano import stories

pytestmark = pytest.mark.skipif(not nano.is_trained(), reason="nano has random weights")

# Stories that the shipped weights told and answered right, in both ways, when they were chosen, and
# with every token's logit well above the next: rounding cannot spoil them, a mistake can. Accuracy
# is measured by `dycoke eval`.
TOLD = (5000, 5002, 5004, 5006, 5007)
# Story, and number of the question.
ASKED = ((5000, 5), (5002, 4), (5004, 3), (5005, 10), (5007, 4), (5008, 1), (5009, 8), (5011, 1))

ways = pytest.mark.parametrize("compressor", [None, DyCoke(0.5, 0.5)], ids=["full", "DyCoke"])


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant.load(device="cpu")


@pytest.fixture(autouse=True)
def clear_choices(assistant: Assistant) -> Iterator[None]:
    """No token was chosen by less than what rounding could make of a logit, 10 000 times over."""
    gaps: list[float] = []

    def watch(module: Any, args: Any, logits: Any) -> None:
        best, next_best = logits[0, -1].float().topk(2).values.tolist()
        gaps.append(best - next_best)

    handle = assistant.model.lm_head.register_forward_hook(watch)
    yield
    handle.remove()
    assert gaps and min(gaps) > 0.5


def clip(seed: int, folder: Path) -> tuple[stories.Story, Path]:
    story = stories.make("seen", seed)
    return story, stories.write(story, folder / f"{seed}.mp4")


@ways
@pytest.mark.parametrize("seed", TOLD)
def test_stories_are_told(seed: int, compressor: Any, assistant: Assistant, tmp_path: Path) -> None:
    story, path = clip(seed, tmp_path)
    answer = assistant.ask(path, stories.DESCRIBE[0], compressor, frames=stories.FRAMES)
    assert answer.text == stories.describe(story)


@ways
@pytest.mark.parametrize(("seed", "number"), ASKED)
def test_questions_are_answered(
    seed: int, number: int, compressor: Any, assistant: Assistant, tmp_path: Path
) -> None:
    story, path = clip(seed, tmp_path)
    question, truth = stories.questions(story)[number]
    answer = assistant.ask(path, question, compressor, frames=stories.FRAMES)
    assert stories.same_answer(answer.text, truth)
