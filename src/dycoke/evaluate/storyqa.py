"""StoryQA: questions about rendered stories, and telling them, under one setting after another."""

from __future__ import annotations

import copy
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dycoke.assistant import Assistant
from dycoke.compat import cache_name, cache_of, chat_prompt
from dycoke.compressor import Compressor
from dycoke.evaluate.stats import Count, paired_difference, wilson
from dycoke.methods.controls import FewerFrames, RandomTokens
from dycoke.methods.dycoke import PLUS, DyCoke
from dycoke.nano import stories
from dycoke.nano.build import TOKENS_PER_FRAME
from dycoke.vision.notes import NOTES

VISUAL = stories.FRAMES * TOKENS_PER_FRAME  # tokens of a story; a newline follows
CHUNK = 16  # stories whose videos are held at once
BATCH = 32  # prompts at once: more does not pay on two cores
SIZES = {"merge_ratio": "K", "token_budget": "B"}
SETTING_NAMES = {  # as lines of the table say it
    **SIZES,
    "prune_ratio": "P",
    "prune_layer": "L",
    "score_layer": "S",
    "echo": "E",
    "echo_exact": "X",
    "skip_ratio": "Z",
    "skip_layer": "ZL",
}
ANSWER_TOKENS = {"ask": 12, "describe": 64}
TASKS = tuple(ANSWER_TOKENS)


@dataclass(frozen=True)
class Setting:
    """One line of the table: a name, and what compresses (None for the full model)."""

    name: str
    method: str
    compressor: Compressor | None

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.to_dict()


DEFAULT_SIZES = tuple({"merge_ratio": ratio} for ratio in (0.3, 0.5, 0.7))


def standard_settings(
    sizes: Sequence[dict[str, Any]] = DEFAULT_SIZES,
    prune_ratio: float = 0.7,
    prune_layer: int = 3,
    **more: Any,
) -> list[Setting]:
    """Full, DyCoke and DyCoke+ at some merge ratios or token budgets, and controls at the last."""

    common = {"prune_ratio": prune_ratio, "prune_layer": prune_layer, **more}

    def line(method: str, make: type[DyCoke], size: dict[str, Any], **own: Any) -> Setting:
        named = {**size, **common}
        what = " ".join(f"{SETTING_NAMES[k]}={v}" for k, v in named.items())
        return Setting(f"{method} {what}", method, make(**{**own, **named}))

    last = sizes[-1]
    return [
        Setting("full", "full", None),
        *(line("dycoke", DyCoke, size) for size in sizes),
        *(line("dycoke+", DyCoke, size, **PLUS) for size in sizes),
        line("random", RandomTokens, last),
        line("fewer-frames", FewerFrames, last),
        line("once", DyCoke, last, refresh_threshold=0),
    ]


@dataclass
class Scores:
    """Counts per story of one setting, in the order of the stories; and what was kept."""

    ask: list[Count] = field(default_factory=list)
    describe: list[Count] = field(default_factory=list)
    visual: int = 0
    kept: float = 0
    active: int = 0

    def count(
        self, row: StoryPrompt, text: str, story: stories.Story, tokens: tuple[int, float, int]
    ) -> None:
        """Take in one answer, and its visual, kept (a mean over layers) and active tokens."""
        if row.task == "ask":
            right, asked = self.ask[row.story]
            self.ask[row.story] = right + stories.same_answer(text, row.truth), asked + 1
        else:
            self.describe[row.story] = stories.events_right(text, story), len(story.events)
        self.visual += tokens[0]
        self.kept += tokens[1]
        self.active += tokens[2]

    def add(self, other: Scores) -> None:
        self.ask += other.ask
        self.describe += other.describe
        self.visual += other.visual
        self.kept += other.kept
        self.active += other.active


@dataclass(frozen=True)
class StoryPrompt:
    """One prompt of one story, with its truth."""

    story: int  # place in the chunk
    task: str  # "ask" or "describe"
    question: str
    truth: str


@dataclass(frozen=True)
class _Encoded:
    """A story as the model takes it: features (or pixels), and notes of the encoder by name."""

    features: Tensor
    notes: dict[str, Any]


class StoryQA:
    """A model's answers about stories.

    Parameters
    ----------
    assistant : model and processor of the LLaVA-OneVision family.
    split : "seen" or "unseen"; training has seen neither's stories.
    first : seed of the first story.
    count : how many stories.
    """

    def __init__(self, assistant: Assistant, split: str, first: int, count: int) -> None:
        self.model, self.processor = assistant.model, assistant.processor
        self.split, self.first, self.count = split, first, count
        self._features: dict[tuple[stories.Story, Compressor | None], _Encoded] = {}
        # transformers 5.17 takes pixels only, and encodes them again for every prompt.
        self._takes_features = (
            "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        )

    def run(
        self,
        compressor: Compressor | None,
        chunk: int = CHUNK,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[Scores]:
        """Scores of ``chunk`` stories at a time, from story ``start`` on, up to ``stop``."""
        stop = self.count if stop is None else stop
        for begin in range(start, stop, chunk):
            seeds = range(self.first + begin, self.first + min(begin + chunk, stop))
            told = [stories.make(self.split, seed) for seed in seeds]  # type: ignore[arg-type]
            yield self._score(told, compressor)

    @torch.inference_mode()
    def _score(self, told: Sequence[stories.Story], compressor: Compressor | None) -> Scores:
        scores = Scores([(0, 0)] * len(told), [(0, 0)] * len(told))
        # A method that drops by the prompt's last token has to read the question first.
        whole = compressor is not None and compressor.drops
        with nullcontext() if compressor is None else compressor(self.model) as run:
            watched = None if whole else self._watch(told, compressor)
            for rows, ids in self._batches(told):
                places = [row.story for row in rows]
                if watched is None:
                    videos = self._videos([told[i] for i in places], compressor)
                    texts = self._generate(ids, rows[0].task, **videos)
                else:
                    texts = self._answer(watched, places, ids, rows[0].task)
                if run is None or run.report is None or not run.report.engaged:
                    counts: list[tuple[int, float, int]] = [(VISUAL, VISUAL, VISUAL)] * len(rows)
                else:
                    counts = [
                        (s.visual_tokens, s.retention * s.visual_tokens, s.active_tokens)
                        for s in run.report.samples
                    ]
                for row, text, count in zip(rows, texts, counts, strict=True):
                    scores.count(row, text, told[row.story], count)
        return scores

    def _batches(self, told: Sequence[stories.Story]) -> Iterator[tuple[list[StoryPrompt], Tensor]]:
        """Prompts about the stories, those of one task and one length together: no padding."""
        for task in ANSWER_TOKENS:
            rows = [row for i, story in enumerate(told) for row in prompts_about(i, story, task)]
            prompts: dict[int, list[tuple[StoryPrompt, list[int]]]] = {}
            for row, ids in zip(rows, self._ids([row.question for row in rows]), strict=True):
                prompts.setdefault(len(ids), []).append((row, ids))
            for alike in prompts.values():
                for i in range(0, len(alike), BATCH):
                    batch = alike[i : i + BATCH]
                    ids_ = torch.tensor([ids for _, ids in batch], device=self.model.device)
                    yield [row for row, _ in batch], ids_

    def _encode(self, story: stories.Story, compressor: Compressor | None = None) -> _Encoded:
        """What the model takes of a story, made once for all settings: features, or pixels.

        Beside them what the method learns of the encoder, where it ``needs_vision`` or skips
        cells; the method must be on the model then.
        """
        wants = compressor is not None and compressor.needs_vision
        skips = compressor is not None and compressor.skip_ratio > 0
        key = (story, compressor if skips else None)  # features of its own
        known = self._features.get(key)
        if known is None or (wants and not known.notes):
            pixels = self.processor.video_processor([stories.render(story)], return_tensors="pt")
            ready, notes = pixels["pixel_values_videos"].to(self.model.device), {}
            ready = ready.to(self.model.dtype)
            if self._takes_features:
                output = self.model.model.get_video_features(ready, return_dict=True)
                ready = output.pooler_output
                notes = {name: getattr(output, name)[0] for name in NOTES if hasattr(output, name)}
            known = self._features[key] = _Encoded(ready[0], notes)
        return known

    def _videos(
        self, told: Sequence[stories.Story], compressor: Compressor | None
    ) -> dict[str, Any]:
        """The videos of a batch, as its model takes them."""
        encoded = [self._encode(story, compressor) for story in told]
        videos = torch.stack([video.features for video in encoded])
        if not self._takes_features:
            return {"pixel_values_videos": videos}
        output = BaseModelOutputWithPooling(pooler_output=videos)
        for name in set(NOTES).intersection(*(video.notes for video in encoded)):
            setattr(output, name, [video.notes[name] for video in encoded])
        return {"mm_encoder_outputs": {"video": output}}

    def _watch(self, told: Sequence[stories.Story], compressor: Compressor | None = None) -> Any:
        """The cache after what all prompts begin with: the video."""
        ids = self._ids([""])[0]
        end = len(ids) - ids[::-1].index(self.model.config.video_token_id)
        prefix = torch.tensor(ids[:end], device=self.model.device).expand(len(told), -1)
        output = self.model(
            input_ids=prefix,
            attention_mask=torch.ones_like(prefix),
            use_cache=True,
            logits_to_keep=1,
            **self._videos(told, compressor),
        )
        return cache_of(output)

    def _answer(self, watched: Any, places: list[int], ids: Tensor, task: str) -> list[str]:
        """Greedy answers to prompts about the stories at ``places`` of what was watched."""
        cache = copy.deepcopy(watched)
        cache.batch_select_indices(torch.tensor(places, device=ids.device))
        return self._generate(ids, task, **{cache_name(self.model.get_decoder()): cache})

    def _generate(self, ids: Tensor, task: str, **more: Any) -> list[str]:
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS[task],
            do_sample=False,
            **more,
        )
        texts: list[str] = self.processor.tokenizer.batch_decode(
            output[:, ids.shape[1] :], skip_special_tokens=True
        )
        return texts

    def _ids(self, questions: Sequence[str]) -> list[list[int]]:
        """Prompts about one story each, as the processor makes them."""
        processor = self.processor
        mark = processor.video_token
        texts = [
            chat_prompt(processor, question).replace(mark, mark * (VISUAL + 1))
            for question in questions
        ]
        ids: list[list[int]] = processor.tokenizer(texts)["input_ids"]
        return ids


def prompts_about(place: int, story: stories.Story, task: str) -> list[StoryPrompt]:
    if task == "describe":
        return [StoryPrompt(place, task, stories.DESCRIBE[0], stories.describe(story))]
    return [StoryPrompt(place, task, q, truth) for q, truth in stories.questions(story)]


class SavedScores:
    """Counts per story of every setting, kept in a file so that a stopped evaluation goes on."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.scores: dict[str, Scores] = {}
        if path is not None and path.is_file():
            saved = json.loads(path.read_text())
            if saved["key"] == key:
                for name, columns in saved["scores"].items():
                    for task in TASKS:
                        columns[task] = [tuple(count) for count in columns[task]]
                    self.scores[name] = Scores(**columns)

    def of(self, name: str) -> Scores:
        return self.scores.setdefault(name, Scores())

    def save(self) -> None:
        if self.path is not None:
            content = {"key": self.key, "scores": {n: vars(s) for n, s in self.scores.items()}}
            scratch = self.path.with_name(self.path.name + ".tmp")
            scratch.write_text(json.dumps(content))
            os.replace(scratch, self.path)


def evaluate(
    assistant: Assistant,
    lines: Sequence[Setting],
    split: str = "seen",
    seed: int = 0,
    count: int = 500,
    keep: Path | None = None,
    model: str = "nano",
    on_chunk: Callable[[str, int], None] | None = None,
    workers: int = 1,
) -> dict[str, Scores]:
    """Run StoryQA under every setting.

    Parameters
    ----------
    keep : file that holds finished stories; an evaluation of the same stories goes on from it.
    model : name of the model, so that the file is not mixed up with another one's.
    on_chunk : called with a setting's name and the number of stories finished now.
    workers : processes of one thread each, which pays for small models on a CPU; 1 stays here.
    """
    key = {"split": split, "seed": seed, "stories": count, "model": model}
    key["dtype"] = str(assistant.model.dtype)
    progress = SavedScores(keep, key)
    tell = on_chunk or (lambda *_: None)
    jobs = []
    for line in lines:
        done = len(progress.of(line.name).ask)
        tell(line.name, done)
        jobs += [(line, begin, min(begin + CHUNK, count)) for begin in range(done, count, CHUNK)]
    with Crew(assistant, (split, seed, count), workers) as crew:
        # In their order, so that a file always holds the first stories of a setting.
        for (line, begin, end), part in zip(jobs, crew.run(jobs), strict=True):
            progress.of(line.name).add(part)
            progress.save()
            tell(line.name, end - begin)
    return progress.scores


Job = tuple[Setting, int, int]


class Crew:
    """Runs jobs, stories ``begin`` to ``end`` under a setting each, here or in processes."""

    def __init__(self, assistant: Assistant, which: tuple[str, int, int], workers: int) -> None:
        self.task = StoryQA(assistant, *which)
        self.pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self.pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not fork
                initializer=_join,
                # A model itself does not survive pickling: transformers forgets its hooks.
                initargs=(assistant.model.name_or_path, assistant.model.dtype, which),
            )

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> Iterator[Scores]:
        if self.pool is None:
            return (_scores(self.task, job) for job in jobs)
        return self.pool.map(_work, jobs)


_TASK: StoryQA | None = None  # a worker process's own


def _join(folder: str, dtype: torch.dtype, which: tuple[str, int, int]) -> None:
    global _TASK
    torch.set_num_threads(1)
    _TASK = StoryQA(Assistant.load(folder, "cpu", dtype), *which)


def _work(job: Job) -> Scores:
    assert _TASK is not None
    return _scores(_TASK, job)


def _scores(task: StoryQA, job: Job) -> Scores:
    line, begin, end = job
    (scores,) = task.run(line.compressor, end - begin, begin, end)
    return scores


def accuracy(mine: Scores, task: str, full: Scores | None) -> dict[str, Any]:
    """Right answers of a task, their Wilson interval, and the paired difference to ``full``."""
    counts: list[Count] = getattr(mine, task)
    correct, n = (sum(column) for column in zip(*counts, strict=True))
    low, high = wilson(correct, n)
    found: dict[str, Any] = {"n": n, "correct": correct, "low": low, "high": high}
    if full is not None:
        found["to_full"] = paired_difference(counts, getattr(full, task))
    return found


def setting_results(lines: Sequence[Setting], scores: dict[str, Scores]) -> list[dict[str, Any]]:
    """One dictionary per setting, ready for JSON; differences to "full" where that was run."""
    full = scores.get("full")
    table = []
    for line in lines:
        mine = scores[line.name]
        row: dict[str, Any] = {
            "name": line.name,
            "method": line.method,
            "settings": line.settings,
            "retention": mine.kept / mine.visual,
            "final_retention": mine.active / mine.visual,
        }
        for task in TASKS:
            row[task] = accuracy(mine, task, None if line.compressor is None else full)
        table.append(row)
    return table
