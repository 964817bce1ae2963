"""What storyqa.yaml calls: prompts, and the scoring of `dycoke eval`."""

from dycoke.nano import stories


def doc_to_visual(doc):
    return [doc["video"]]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    content = [
        {"type": "video", "url": doc["video"]},
        {"type": "text", "text": doc["question"]},
    ]
    return [{"role": "user", "content": content}]


def process_results(doc, results):
    """{"ask" or "describe": (right, of how many)}."""
    if doc["task"] == "ask":
        return {"ask": (int(stories.same_answer(results[0], doc["truth"])), 1)}
    story = stories.make(doc["split"], doc["story"])
    return {"describe": (stories.events_right(results[0], story), len(story.events))}


def share_right(counts):
    return sum(right for right, _ in counts) / sum(of for _, of in counts)
