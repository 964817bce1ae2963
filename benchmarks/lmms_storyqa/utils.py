"""What storyqa.yaml calls: prompts, and the scoring of `dycoke eval`."""

from typing import Any

from dycoke.nano import stories

Doc = dict[str, Any]


def doc_to_visual(doc: Doc) -> list[str]:
    return [doc["video"]]


def doc_to_messages(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> list[Doc]:
    content = [
        {"type": "video", "url": doc["video"]},
        {"type": "text", "text": doc["question"]},
    ]
    return [{"role": "user", "content": content}]


def process_results(doc: Doc, results: list[str]) -> dict[str, tuple[int, int]]:
    """{"ask" or "describe": (right, of how many)}."""
    if doc["task"] == "ask":
        return {"ask": (int(stories.same_answer(results[0], doc["truth"])), 1)}
    story = stories.make(doc["split"], doc["story"])
    return {"describe": (stories.events_right(results[0], story), len(story.events))}


def share_right(counts: list[tuple[int, int]]) -> float:
    return sum(right for right, _ in counts) / sum(of for _, of in counts)
