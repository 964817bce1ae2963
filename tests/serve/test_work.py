"""Batches, kept videos and faults, without HTTP."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dycoke.assistant import Assistant
from dycoke.batching import Row
from dycoke.compressor import Compressor
from dycoke.methods import create
from dycoke.nano import stories
from dycoke.serve import work
from dycoke.serve.protocol import ApiError
from dycoke.serve.work import Job, SeenCache, Worker
from dycoke.video import Video, read

FRAMES = 24
TELL = stories.DESCRIBE[0]
MOST = 20  # tokens of an answer: stories are told apart by then


class Box:
    """What a job was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._end = threading.Event()

    def __call__(self, what: tuple[Any, ...]) -> None:
        self.told.append(what)
        if what[0] in ("done", "error"):
            self._end.set()

    @property
    def last(self) -> tuple[Any, ...]:
        assert self._end.wait(60)
        return self.told[-1]

    @property
    def text(self) -> str:
        kind, answer, *_ = self.last
        assert kind == "done", answer
        assert "".join(what[1] for what in self.told if what[0] == "text") == answer.text
        return str(answer.text)


@pytest.fixture
def start(nano: Assistant) -> Iterator[Callable[..., Worker]]:
    workers = []

    def make(**settings: Any) -> Worker:
        workers.append(Worker(nano, **settings))
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()


def job(
    nano: Assistant,
    video: Video,
    asked: str = TELL,
    compressor: Compressor | None = None,
    **more: Any,
) -> tuple[Job, Box]:
    box = Box()
    content = [{"type": "video"}, {"type": "text", "text": asked}]
    turns = [{"role": "user", "content": content}]
    row = Row(MOST, cancelled=more.pop("cancelled", lambda: False))
    inputs = nano.prepare_chat(turns, [video])
    base = Job(turns, [video], [], inputs, compressor, {}, None, row, box)
    return replace(base, **more), box


def keep(worker: Worker, one: Job) -> None:
    """Submit a job as the server does where it keeps videos."""
    one.video_key = worker.key_of(one.turns, one.videos, one.images, one.compressor)
    worker.submit(one)


class Held(Worker):
    """A worker that begins when it is told to."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.go = threading.Event()
        super().__init__(*args, **more)

    def _work(self) -> None:
        self.go.wait()
        super()._work()


def test_equal_settings_go_together_and_answers_are_their_own(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    worker = Held(nano, max_batch=3)
    plus, full = create("dycoke+"), None
    order = [(301, plus), (302, full), (303, plus), (304, plus), (305, plus), (306, full)]
    boxes = []
    for seed, compressor in order:
        one, box = job(nano, read(clip(seed), FRAMES), compressor=compressor)
        worker.submit(one)
        boxes.append(box)
    assert worker.waiting == 6
    worker.go.set()
    texts = [box.text for box in boxes]
    worker.stop()
    assert list(worker.batches) == [3, 2, 1]
    for (seed, compressor), text in zip(order, texts, strict=True):
        alone = nano.ask(clip(seed), TELL, compressor, frames=FRAMES, max_new_tokens=MOST)
        assert text == alone.text
    assert len(set(texts)) == 6


@pytest.mark.parametrize("whose", ["request", "model"])
def test_what_counts_words_meets_no_padding(
    nano: Assistant, clip: Callable[[int], Path], whose: str, monkeypatch: Any
) -> None:
    """A repetition penalty takes what fills up a shorter prompt for words of its own."""
    given = {"repetition_penalty": 1.3} if whose == "request" else {}
    if whose == "model":
        monkeypatch.setattr(nano.model.generation_config, "repetition_penalty", 1.3)
    worker = Held(nano, max_batch=3)
    boxes = []
    for asked in (TELL, "How many events are there?", TELL):
        one, box = job(nano, read(clip(301), FRAMES), asked, generate=given)
        worker.submit(one)
        boxes.append(box)
    worker.go.set()
    texts = [box.text for box in boxes]
    worker.stop()
    assert list(worker.batches) == [2, 1] and texts[0] == texts[2]


def test_a_video_is_watched_once(nano: Assistant, clip: Callable[[int], Path], start: Any) -> None:
    worker = start(cache_bytes=1 << 30)
    counted: list[int] = []
    hook = nano.model.model.vision_tower.register_forward_hook(lambda *_: counted.append(1))
    try:
        for seed, asked in ((301, TELL), (301, "How many events are there?"), (302, TELL)):
            one, box = job(nano, read(clip(seed), FRAMES), asked, create("dycoke"))
            keep(worker, one)
            alone = box.text
            before = len(counted)
            told = nano.ask(
                clip(seed), asked, create("dycoke"), frames=FRAMES, max_new_tokens=MOST
            ).text
            del counted[before:]
            assert alone == told
    finally:
        hook.remove()
    assert len(counted) == 2 and (worker.cache.hits, worker.cache.misses) == (1, 2)


def test_clips_of_one_length_never_answer_for_each_other(
    nano: Assistant, clip: Callable[[int], Path], start: Any
) -> None:
    """And what differs in frames, settings or order is another video, too."""
    worker = start(cache_bytes=1 << 30)
    one, other = read(clip(301), FRAMES), read(clip(302), FRAMES)
    backwards = replace(one, frames=one.frames[::-1].copy())
    asked = [(one, None), (other, None), (backwards, None), (one, create("dycoke")), (one, None)]
    texts = []
    for video, compressor in asked:
        made, box = job(nano, video, compressor=compressor)
        keep(worker, made)
        texts.append(box.text)
    assert (worker.cache.hits, worker.cache.misses) == (1, 4)
    assert texts[0] == texts[4] and len(set(texts[:3])) == 3


def test_later_turns_begin_from_the_kept_video(
    nano: Assistant, clip: Callable[[int], Path], start: Any
) -> None:
    worker = start(cache_bytes=1 << 30)
    video = read(clip(301), FRAMES)
    first, box = job(nano, video)
    keep(worker, first)
    turns = [
        *first.turns,
        {"role": "assistant", "content": [{"type": "text", "text": box.text}]},
        {"role": "user", "content": [{"type": "text", "text": "What stays still?"}]},
    ]
    inputs = nano.prepare_chat(turns, [video])
    later, box = job(nano, video, turns=turns, inputs=inputs)
    keep(worker, later)
    assert box.last[2] > 800 and worker.cache.hits == 1  # tokens that were there already
    plain = start()
    again, whole = job(nano, video, turns=turns, inputs=inputs)
    keep(plain, again)
    assert whole.last[2] == 0 and box.text == whole.text
    # Something in front of the video makes it another prompt.
    turns = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *first.turns]
    made, box = job(nano, video, turns=turns, inputs=nano.prepare_chat(turns, [video]))
    keep(worker, made)
    assert box.last[2] == 0 and (worker.cache.hits, worker.cache.misses) == (1, 1)
    # A template that says something there is found out by the tokens.
    again, other = job(nano, video, turns=turns, inputs=made.inputs, video_key=first.video_key)
    worker.submit(again)
    assert other.last[2] == 0 and other.text == box.text


def test_a_kept_video_takes_no_inputs_but_tokens_and_goes_alone(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    worker, video, boxes = Held(nano, cache_bytes=1 << 30), read(clip(301), FRAMES), []
    seen = nano.watch(video)
    for i in range(4):
        one, box = job(nano, video)
        if i % 2:
            one.seen, one.inputs = seen, {"input_ids": seen.tokens(one.turns, nano.reader())}
        keep(worker, one)
        boxes.append(box)
    worker.go.set()
    worker.stop()
    assert list(worker.batches) == [2, 1, 1] and worker.cache.hits == 2
    assert len({box.text for box in boxes}) == 1
    assert [box.last[2] for box in boxes] == [0, seen.length, 0, seen.length]


def test_kept_videos_are_bounded() -> None:
    class Fake:
        def __init__(self, nbytes: int) -> None:
            self.nbytes = nbytes

    cache: Any = SeenCache(100)
    for key, size in (("a", 40), ("b", 40), ("large", 101)):
        cache.put(key, Fake(size))
    assert cache.bytes == 80 and cache.get("large") is None
    assert cache.get("a") is not None  # so "b" is the one that was used least recently
    cache.put("c", Fake(30))
    assert cache.get("b") is None and cache.bytes == 70 and len(cache) == 2


def test_one_bad_request_leaves_the_others_of_its_batch_alone(
    nano: Assistant, clip: Callable[[int], Path], monkeypatch: Any
) -> None:
    worker = Held(nano)
    made = [job(nano, read(clip(seed), FRAMES)) for seed in (301, 302, 303)]
    bad, real = made[1][0], work.answer_rows

    def answer_rows(assistant: Any, inputs: Any, rows: Any, *args: Any, **more: Any) -> Any:
        if bad.row in rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(assistant, inputs, rows, *args, **more)

    monkeypatch.setattr(work, "answer_rows", answer_rows)
    for one, _ in made:
        worker.submit(one)
    worker.go.set()
    worker.stop()
    kinds = [box.last[0] for _, box in made]
    assert kinds == ["done", "error", "done"]
    assert made[1][1].last[1].status == 503


def test_who_has_gone_is_not_answered(nano: Assistant, clip: Callable[[int], Path]) -> None:
    worker = Held(nano)
    video = read(clip(301), FRAMES)
    heard: list[int] = []
    before, gone = job(nano, video, cancelled=lambda: True)
    during, cut = job(nano, video, cancelled=lambda: len(heard) > 2)
    stays, whole = job(nano, video)
    for one in (before, during, stays):
        worker.submit(one)
    inner = during.emit
    during.emit = lambda what: (heard.append(1), inner(what))[1]  # type: ignore[func-returns-value]
    worker.go.set()
    worker.stop()
    assert gone.last[0] == "error" and len(before.row.ids) == 0
    assert cut.last[1].finish_reason == "cancelled" and len(during.row.ids) == 4
    assert whole.last[1].finish_reason == "length" and whole.text.startswith(cut.last[1].text)


def test_a_full_queue_and_a_stopping_server_refuse(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    worker = Held(nano, max_waiting=2)
    video = read(clip(301), FRAMES)
    made = [job(nano, video) for _ in range(3)]
    for one, _ in made[:2]:
        worker.submit(one)
    with pytest.raises(ApiError) as caught:
        worker.submit(made[2][0])
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    worker.go.set()
    worker.stop()  # what waits is finished
    assert made[0][1].text == made[1][1].text
    with pytest.raises(ApiError) as caught:
        worker.submit(made[2][0])
    assert caught.value.status == 503


def test_sampling_with_a_seed_is_repeated_and_goes_alone(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    worker = Held(nano)
    video = read(clip(301), FRAMES)
    hot = {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "top_k": 0}
    made = [job(nano, video, generate=hot, seed=seed) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    for one, _ in made:
        worker.submit(one)
    worker.go.set()
    worker.stop()
    assert list(worker.batches) == [1, 1, 1]
    assert made[0][1].text == made[1][1].text != made[2][1].text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_job_that_is_answered_is_free_at_once(
    nano: Assistant, clip: Callable[[int], Path]
) -> None:
    """Frames and pixels of requests must not wait for the collector of cycles."""
    worker = Worker(nano)
    gc.collect()
    gc.disable()
    try:
        known = []
        for _ in range(3):
            one, box = job(nano, read(clip(301), FRAMES))
            worker.submit(one)
            assert box.text
            known.append(weakref.ref(one))
            del one, box
        worker.stop()
        del worker
        assert [ref() for ref in known] == [None] * 3
    finally:
        gc.enable()
