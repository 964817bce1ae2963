"""dycoke batch: what scheduling costs, Ray against local processes, batches against one by one.

    python benchmarks/batch_throughput.py overhead --videos 10000
    python benchmarks/batch_throughput.py ray --videos 4000
    python benchmarks/batch_throughput.py batches --videos 16 --repeat 3
    python benchmarks/batch_throughput.py memory --videos 1000

``overhead`` and ``ray`` have a stub for a model, which answers at once, or after ``--pause``
seconds; ``batches`` and ``memory`` have the embedded one. One JSON line comes last.

Predictions (2 cores): overhead 0.3 ms per video with one worker, since a video costs two appended
lines, two hand-overs between threads and one message. Ray 0.95 to 1.05 of the local runner once
both have started, as each only hands out shards, and 10 s more to start. Batches of 8 on one core
1.5x: an answer of 18 tokens is about half decoding, which a batch does nearly at the price of one,
and half video, encoder and prefill, which it does not make cheaper. Memory: within 5 % from the
first tenth of the videos to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dycoke.batch.drive import Runner, drive
from dycoke.batch.items import Item, Question
from dycoke.batch.local import Told, run_local
from dycoke.batch.rows import Clip, Reply, Stamp
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Loaded, Plan, Worker

STORIES = 32
ASK = "Describe what happens in this video."


@dataclass(frozen=True)
class Stub:
    """Its own spec and its own answerer, of videos that nobody reads."""

    pause: float = 0.0

    @property
    def stamp(self) -> Stamp:
        return Stamp("stub", {}, "stub")

    def build(self) -> Stub:
        return self

    def on(self, worker: int, workers: int) -> Stub:
        return self

    def load(self, item: Item, scratch: str) -> Loaded:
        return Loaded(Clip(item.frames, 1.0), None, None)

    def answer(self, items: Sequence[Item], loaded: Sequence[Loaded]) -> list[list[Reply]]:
        if self.pause:
            time.sleep(self.pause)
        return [[Reply(item.video, "stop") for _ in item.questions] for item in items]

    def broken(self, error: Exception) -> bool:
        return False


class Memory:
    """Resident MiB of this process and its children, sampled while it is open."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.2):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            total = 0.0
            for process in ("self", *children):
                try:
                    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
                except OSError:
                    continue
                total += int(pages) * os.sysconf("SC_PAGESIZE") / (1 << 20)
            self.samples.append((time.perf_counter(), total))

    def at(self, moment: float) -> float:
        return min(self.samples, key=lambda sample: abs(sample[0] - moment))[1]


def stub_items(count: int) -> list[Item]:
    return [Item(f"/clips/{i:06d}.mp4", 8, (Question(f"{i:06d}", ASK),)) for i in range(count)]


def timed(items: Sequence[Item], make: Any, shard_size: int) -> dict[str, float]:
    """A run by a runner: seconds in all, and videos a second from its first finished shard on."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(Path(scratch) / "out")
        runner: Runner = make(folder)
        marks: list[tuple[float, int]] = []
        shards: dict[int, int] = {}

        def listened(given: Mapping[int, Sequence[Item]], told: Told) -> None:
            def hear(shard: int, done: int, failed: int) -> None:
                told(shard, done, failed)
                if done == len(given[shard]) and shard not in shards:
                    shards[shard] = done
                    marks.append((time.perf_counter(), sum(shards.values())))

            runner(given, hear)

        began = time.perf_counter()
        with Memory() as memory:
            drive(items, folder, {}, listened, shard_size)
        whole = time.perf_counter() - began
        assert len(folder.parts()) == len(shards)
        first, last = marks[0], marks[-1]
        steady = (last[1] - first[1]) / max(last[0] - first[0], 1e-9)
        tenth = marks[len(marks) // 10][0]
        return {
            "seconds": round(whole, 2),
            "videos_per_second": round(steady, 2),
            "mib_at_a_tenth": round(memory.at(tenth), 1) if memory.samples else 0.0,
            "mib_at_the_end": round(memory.at(last[0]), 1) if memory.samples else 0.0,
        }


def local(spec: Any, workers: int, plan: Plan | None = None) -> Any:
    return lambda folder: partial(run_local, spec, folder, plan or Plan(), workers)


def overhead(args: Any) -> dict[str, Any]:
    """Milliseconds that a video costs beside what a model does with it."""
    found: dict[str, Any] = {}
    for workers in (1, 2):
        run = timed(stub_items(args.videos), local(Stub(), workers), args.shard_size)
        run["ms_per_video"] = round(1000 * workers / run["videos_per_second"], 3)
        found[f"{workers}_workers"] = run
    return found


def against_ray(args: Any) -> dict[str, Any]:
    """Two actors against two processes, in turn."""
    from dycoke.batch.on_ray import run_ray

    items, stub = stub_items(args.videos), Stub(args.pause)
    found: dict[str, Any] = {"local": [], "ray": []}
    for _ in range(args.repeat):
        found["local"].append(timed(items, local(stub, 2), args.shard_size))
        found["ray"].append(
            timed(items, lambda folder: partial(run_ray, stub, folder, Plan(), 2), args.shard_size)
        )
    rates = {
        name: statistics.median(run["videos_per_second"] for run in runs)
        for name, runs in found.items()
    }
    return {**found, "ray_to_local": round(rates["ray"] / rates["local"], 3)}


def clips(folder: Path, count: int) -> list[Item]:
    """Stories of the embedded model's world, asked about in turn."""
    from dycoke.nano import stories

    files = [
        stories.write(stories.make("seen", 500 + i), folder / f"{i}.mp4")
        for i in range(min(count, STORIES))
    ]
    return [Item(str(files[i % STORIES]), 24, (Question(f"{i}", ASK),)) for i in range(count)]


def batches(args: Any) -> dict[str, Any]:
    """The embedded model on one core: batches of each size, in turn, in this process."""
    import torch

    from dycoke import DyCoke
    from dycoke.batch.answering import ModelSpec

    torch.set_num_threads(1)
    model = ModelSpec(device="cpu", compressor=DyCoke(), method="dycoke", threads=1).build()
    sizes = (1, args.batch_size)
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    computed: dict[int, list[float]] = {size: [] for size in sizes}
    texts: dict[int, list[str]] = {}
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        items = clips(Path(scratch), args.videos)
        for turn in range(args.repeat + 1):  # the first to warm up
            for size in sizes:
                folder = Folder(Path(scratch) / f"{turn}-{size}")
                folder.begin({})
                began, busy = time.perf_counter(), time.process_time()
                Worker(model, folder, Plan(batch_size=size)).run(0, items)
                if turn:
                    taken[size].append(time.perf_counter() - began)
                    computed[size].append(time.process_time() - busy)
                rows = list(folder.rows(0))
                texts[size] = [row["text"] for row in rows]
                for name in ("decode", "encode", "prefill", "total"):
                    mean = statistics.mean(row["seconds"][name] for row in rows)
                    stages[f"{name}_s at {size}"] = round(mean, 4)
    found: dict[str, Any] = {}
    # What a processor computed depends less on who else is there than what a clock says.
    for name, what in (("", taken), ("cpu_", computed)):
        medians = {size: statistics.median(seconds) for size, seconds in what.items()}
        found[f"{name}seconds"] = {size: [round(s, 2) for s in what[size]] for size in sizes}
        found[f"{name}speedup"] = round(medians[1] / medians[args.batch_size], 3)
    return {
        **found,
        "equal_answers": sum(a == b for a, b in zip(*texts.values(), strict=True)),
        "stages": stages,
    }


def memory(args: Any) -> dict[str, Any]:
    """The embedded model in one worker's process, over the run."""
    from dycoke import DyCoke
    from dycoke.batch.answering import ModelSpec

    spec = ModelSpec(device="cpu", compressor=DyCoke(), method="dycoke", threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        items = clips(Path(scratch), args.videos)
        return timed(items, local(spec, 1, Plan(batch_size=args.batch_size)), args.shard_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("overhead", "ray", "batches", "memory"))
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="File for the result.")
    args = parser.parse_args()
    run = {"overhead": overhead, "ray": against_ray, "batches": batches, "memory": memory}
    found = run[args.what](args)
    from dycoke.bench.results import origin  # late, since workers of a stub have no torch

    content = {
        **origin(["python", *sys.argv], "cpu"),
        "cores": os.cpu_count(),
        "what": args.what,
        "videos": args.videos,
        **found,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
