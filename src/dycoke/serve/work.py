"""Requests that wait become batches: one thread generates, and each row streams on its own."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dycoke.assistant import Answer, Assistant, Seen, Turns, content_of
from dycoke.batching import Row, answer_rows, collate, pad_of, shapes
from dycoke.compressor import Compressor
from dycoke.core.steps import Step
from dycoke.models.locate import FrameSource, frame_source_of
from dycoke.serve.protocol import ApiError, as_api_error
from dycoke.timing import Timings
from dycoke.video import Video

LOG = logging.getLogger("dycoke.serve")
Call = Callable[[], None]
Emit = Callable[[tuple[Any, ...]], None]
Key = tuple[bytes, Compressor | None]
"""Of a video among those that are kept: its frames' digest, and the method."""


class Watcher(Protocol):
    """Listens to what the forwards of one row did."""

    def __call__(self, step: Step) -> None: ...

    def finish(self, last: int | None) -> None:
        """The answer is complete; ``last`` is its last token."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes
    ----------
    turns, videos, images : the conversation, and what its parts are.
    inputs : the model's, as `Assistant.prepare_chat` made them; of a video that is kept only the
        prompt's tokens, ``input_ids``.
    compressor : None for the full model.
    generate : arguments of generate.
    seed : of sampling; jobs with one go alone.
    row : where tokens go.
    emit : called in the generating thread with ("text", piece), ("done", answer, cached tokens) or
        ("error", ApiError).
    watch : makes the listener of a row, by its place in the batch; None where nobody looks.
    before : seconds of fetching and decoding, and of the processor.
    seen : the job's video, where it is kept since another question; it then goes alone.
    video_key : of the video among those that are kept; None where it is not looked for there.
    visual : the prompt's visual tokens, where it goes to the full model, which has no report.
    """

    turns: Turns
    videos: Sequence[Video]
    images: Sequence[Any]
    inputs: Mapping[str, Any]
    compressor: Compressor | None
    generate: Mapping[str, Any]
    seed: int | None
    row: Row
    emit: Emit
    watch: Callable[[int], Watcher] | None = None
    before: tuple[float, float] = (0.0, 0.0)
    seen: Seen | None = None
    video_key: Key | None = None
    visual: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal for jobs that can be one batch."""
        alone = id(self) if self.seed is not None or self.seen is not None else None
        # Frames that are images to the model are told apart by how many each prompt has.
        frames = tuple(len(video.frames) for video in self.videos)
        return (
            self.compressor,
            tuple(sorted(self.generate.items())),
            alone,
            frames,
            len(self.images),
            shapes(self.inputs),
        )


class SeenCache:
    """Videos that were watched, least recently used first, bounded in bytes; for any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[Key, Seen] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Seen | None:
        with self._lock:
            seen = self._kept.get(key)
            if seen is not None:
                self._kept.move_to_end(key)
            return seen

    def put(self, key: Key, seen: Seen) -> None:
        """Keep a watched video, where it fits at all."""
        if seen.nbytes > self.max_bytes:
            return
        with self._lock:
            self._kept[key] = seen
            self.bytes += seen.nbytes
            while self.bytes > self.max_bytes:
                _, old = self._kept.popitem(last=False)
                self.bytes -= old.nbytes


class Worker:
    """The thread that generates, and what waits for it.

    Parameters
    ----------
    assistant : model and processor.
    max_batch : most requests in one batch.
    max_waiting : most requests that wait.
    cache_bytes : most bytes of watched videos that are kept; 0 for none.
    """

    def __init__(
        self, assistant: Assistant, max_batch: int = 8, max_waiting: int = 64, cache_bytes: int = 0
    ) -> None:
        self.assistant, self.max_batch, self.max_waiting = assistant, max_batch, max_waiting
        self.cache = SeenCache(cache_bytes)
        self.batches: deque[int] = deque(maxlen=1000)  # sizes of the last ones
        self.running = 0
        self._waiting: deque[Job | Call] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="dycoke-generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job | Call) -> None:
        """Put a job in the queue; or a function, which then has the model to itself.

        Raises
        ------
        ApiError
            429 where the queue is full, 503 where the server stops.
        """
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self._waiting) >= self.max_waiting:
                raise full(self.max_waiting)
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Finish what waits, take nothing more, and return when all is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self.running = len(batch) if isinstance(batch, list) else 1
            try:
                if isinstance(batch, list):
                    self.batches.append(len(batch))
                    self._answer(batch)
                else:
                    batch()
            except Exception:  # whoever waits for it was told; the thread must live on
                LOG.exception("a request failed")
            finally:
                self.running = 0

    def _next(self) -> list[Job] | Call:
        """The oldest job and those that can go with it; [] at the end."""
        with self._changed:
            while not self._waiting:
                if self._stopping:
                    return []
                self._changed.wait()
            first = self._waiting.popleft()
            if not isinstance(first, Job):
                return first
            batch, key = [first], self._alike(first)
            for job in list(self._waiting):
                if len(batch) == self.max_batch:
                    break
                if isinstance(job, Job) and self._alike(job) == key:
                    self._waiting.remove(job)
                    batch.append(job)
            return batch

    def _alike(self, job: Job) -> tuple[Any, ...]:
        """What is equal for jobs that can be one batch, with this model."""
        usual = getattr(self.assistant.model.generation_config, "repetition_penalty", None)
        penalty = job.generate.get("repetition_penalty", usual)
        # It counts what fills up shorter prompts as words of theirs.
        length = None if penalty in (None, 1) else job.inputs["input_ids"].shape[1]
        return *job.key, length

    def _answer(self, batch: list[Job]) -> None:
        """Answer a batch; where it fails before a word was said, each of its jobs alone."""
        left = []
        for job in batch:
            if job.row.cancelled():
                job.emit(("error", ApiError(499, "cancelled")))
            else:
                left.append(job)
        if not left:
            return
        try:
            answers, cached = self._generate(left)
        except Exception as error:
            if len(left) > 1 and not any(job.row.ids for job in left):
                for job in left:
                    self._answer([job])
                return
            for job in left:
                job.emit(("error", as_api_error(error)))
            return
        for job, answer in zip(left, answers, strict=True):
            job.emit(("done", answer, cached))

    def _generate(self, jobs: list[Job]) -> tuple[list[Answer], int]:
        first = jobs[0]
        inputs, cached, watching = self._inputs(jobs)
        watchers = [job.watch and job.watch(place) for place, job in enumerate(jobs)]
        listening = [watcher for watcher in watchers if watcher is not None]

        def listen(step: Step) -> None:
            for watcher in listening:
                watcher(step)

        for job in jobs:
            job.row.on_token = _teller(job.emit)
        with torch.random.fork_rng(enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed)
            answers = answer_rows(
                self.assistant,
                inputs,
                [job.row for job in jobs],
                first.compressor,
                on_step=listen if listening and first.compressor is not None else None,
                frame_source=source_of(self.assistant, first.videos),
                before=max(job.before for job in jobs),
                **first.generate,
            )
        if watching is not None:
            answers = [replace(one, timings=_sum(watching, one.timings)) for one in answers]
        for job, watcher in zip(jobs, watchers, strict=True):
            if watcher is not None:
                watcher.finish(job.row.ids[-1] if job.row.ids else None)
        return answers, cached

    def _inputs(self, jobs: list[Job]) -> tuple[Mapping[str, Any], int, Timings | None]:
        """The batch's inputs, how many of its prompt's tokens were there already, and what watching
        its video took, where that was done now.
        """
        if len(jobs) > 1:
            return collate([job.inputs for job in jobs], pad_of(self.assistant)), 0, None
        (job,) = jobs
        if job.video_key is None:
            return job.inputs, 0, None
        # It may be kept since this job was prepared.
        seen, watching = job.seen or self.cache.get(job.video_key), None
        if seen is not None:
            self.cache.hits += 1
        else:
            self.cache.misses += 1
            (video,), prepared = job.videos, (job.turns, job.inputs)
            seen = self.assistant.watch(video, job.compressor, prepared=prepared)
            watching = seen.timings
            self.cache.put(job.video_key, seen)
        ids = job.inputs["input_ids"]
        if not seen.begins(ids):  # a template that puts something before the video at times
            return job.inputs, 0, watching
        return seen.inputs_of(ids), 0 if watching else seen.length, watching

    def key_of(
        self,
        turns: Turns,
        videos: Sequence[Video],
        images: Sequence[Any],
        method: Compressor | None,
    ) -> Key | None:
        """Of a conversation's video among those that are kept; None for one that keeps none.

        Those are kept that a conversation is about alone, with nothing said before it.
        """
        drops = method is not None and method.drops
        if not self.cache.max_bytes or drops or images or len(videos) != 1:
            return None
        role, content = turns[0]["role"], turns[0]["content"]
        if role != "user" or not content or content[0]["type"] != "video":
            return None
        return content_of(videos[0]), method


def source_of(assistant: Assistant, videos: Sequence[Video]) -> FrameSource | None:
    """Where the frames of a prompt with these videos are, see `Compressor.__call__`."""
    source = frame_source_of(assistant.model.config)
    if source == "images" and len(videos) > 1:
        return tuple(len(video.frames) for video in videos)
    return source


def full(waiting: int) -> ApiError:
    """The error where too many wait."""
    return ApiError(429, f"{waiting} requests are waiting; try later", code="rate_limit_exceeded")


def _sum(watching: Timings, asking: Timings) -> Timings:
    """What a question took about a video that was watched for it."""
    one, two = watching.to_dict(), asking.to_dict()
    own = {name: two[name] for name in ("decode_s", "process_s", "video_s", "per_token_s")}
    both = {name: one[name] + two[name] for name in one.keys() - own}
    return Timings(**both, **own)


def _teller(emit: Emit) -> Callable[[Row, str], None]:
    """What a row tells; it must not know its job, or both stay until cycles are collected, with the
    job's frames and pixels.
    """

    def tell(row: Row, piece: str) -> None:
        emit(("text", piece))

    return tell
