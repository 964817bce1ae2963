"""From samples to results: medians, true counts, ratios to the full model, and what they are of."""

from __future__ import annotations

import contextlib
import platform
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

from dycoke import __version__
from dycoke.bench.arch import ARCHS
from dycoke.bench.peak import peak_of_process
from dycoke.bench.plan import Plan
from dycoke.bench.speed import Bench, Sample
from dycoke.core.echo import REACH
from dycoke.costs import Extras, Shape, counted, seen_share
from dycoke.precision import name_of
from dycoke.timing import Timings

TIMED_STAGES = tuple(field.name for field in fields(Timings))
TOTALS = ("llm_s", "kv_bytes", "peak_bytes", "flops")


def measure(
    plan: Plan,
    path: str,
    command: str = "",
    on_run: Callable[[str], None] | None = None,
    peaks: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the plan on the video at ``path``: what it is about, and a row per method.

    ``peaks`` asks for peak memory on the CPU too, each in a process of its own. Raises what `Bench`
    and `Bench.measure` raise.
    """
    bench = Bench(plan)
    samples = bench.measure(path, on_run)
    head = heading(bench, next(iter(samples.values()))[-1], command)
    rows = method_results(bench, samples)
    on_cpu = bench.model.device.type == "cpu"
    del bench  # its weights should not crowd out the processes that come now
    if peaks and on_cpu:
        for row in rows:
            if on_run is not None:
                on_run(f"peak memory: {row['method']}")
            row["peak_bytes"] = peak_of_process(plan, path, row["method"])
    compare(rows)
    return head, rows


def method_results(bench: Bench, samples: Mapping[str, list[Sample]]) -> list[dict[str, Any]]:
    """One dictionary per method, ready for JSON; `compare` adds the ratios.

    ``stages`` holds medians in seconds, ``stages_min`` and ``stages_max`` their range, ``llm_s``
    the median of the total without video and vision encoder. Token counts are those of one prompt
    of the batch, ``flops`` is the paper's formula on them, over the whole batch.
    """
    table = []
    for name, runs in samples.items():
        times = [run.timings.to_dict() for run in runs]
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        row: dict[str, Any] = {"method": name, **_tokens(bench, runs[-1])}
        for key, take in (
            ("stages", statistics.median),
            ("stages_min", min),
            ("stages_max", max),
        ):
            row[key] = {stage: round(take([t[stage] for t in times]), 6) for stage in TIMED_STAGES}
        llm = [t["total_s"] - t["video_s"] - t["vision_s"] for t in times]
        row["llm_s"] = round(statistics.median(llm), 6)
        row["kv_bytes"] = runs[-1].kv_bytes
        row["peak_bytes"] = max(peaks) if peaks else None
        table.append(row)
    return table


def _tokens(bench: Bench, sample: Sample) -> dict[str, Any]:
    """Settings and true counts of a run, and the FLOPs that follow from them."""
    text = bench.model.config.get_text_config()
    shape = Shape(text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    report, kept = sample.report, sample.visual_tokens
    encoded, active, refreshes, new = kept, kept, 0, bench.plan.new_tokens
    flops = counted(kept, active, shape, new).total
    if report is not None:
        first = report.samples[0]  # the batch repeats it
        encoded = sum(video.encoded_tokens for video in first.videos)
        kept, active, refreshes = first.kept_tokens, first.active_tokens, first.refreshes
        extras = Extras(
            first.visual_tokens - kept,
            report.echo_layers,
            report.exact_layers,
            seen_share(max((video.frames for video in first.videos), default=0), REACH),
            kept if report.scores_late else 0.0,
        )
        flops = counted(kept, active, shape, new, extras).total
        if report.below < 1:  # later layers hold less, in the prefill too
            lower, upper = (counted(n, n, shape, new).total for n in (kept, active))
            flops = report.below * lower + (1 - report.below) * upper
            flops += extras.prefill(kept, shape)
    return {
        "settings": report.settings if report else {},
        "not_engaged": report.reason if report else None,
        "visual_tokens": sample.visual_tokens,
        "encoded_tokens": encoded,
        "kept_tokens": kept,
        "active_tokens": active,
        "refreshes": refreshes,
        "flops": flops * bench.plan.batch,
    }


def compare(table: list[dict[str, Any]]) -> None:
    """Add ``vs_full`` to each row: how many times less than the full model; None without it."""
    full = next((row for row in table if row["method"] == "full"), None)
    for row in table:
        if full is None:
            row["vs_full"] = None
            continue
        mine, whole = ({**r["stages"], **{k: r[k] for k in TOTALS}} for r in (row, full))
        row["vs_full"] = {
            key: round(whole[key] / mine[key], 3) if mine[key] and whole[key] else None
            for key in mine
            if key != "compress_s"  # the full model has none to compare with
        }


def heading(bench: Bench, sample: Sample, command: str) -> dict[str, Any]:
    """What the results are about: shapes, machine and versions."""
    plan, model = bench.plan, bench.model
    text = model.config.get_text_config()
    cut = None
    if plan.arch is not None and plan.arch.layers != (
        whole := ARCHS.get(plan.arch.name, plan.arch).layers
    ):
        cut = {
            "language": [plan.arch.layers[0], whole[0]],
            "vision": [plan.arch.layers[1], whole[1]],
        }
    return {
        "arch": plan.arch.name if plan.arch else model.config.model_type,
        "model": None if plan.arch else plan.model or "nano",
        "layers": text.num_hidden_layers,
        "layers_cut": cut,
        "frames": sample.frames,
        "new_tokens": plan.new_tokens,
        "batch": plan.batch,
        "repeat": plan.repeat,
        "retention": plan.retention,
        "prompt_tokens": sample.prompt_tokens,
        "visual_tokens": sample.visual_tokens,
        "video": plan.video or "a story rendered by dycoke.nano.stories",
        "device": str(model.device),
        "hardware": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": name_of(model.dtype),
        "attention": text._attn_implementation,
        "versions": versions(),
        "command": command,
    }


def origin(command: Sequence[str], device: str) -> dict[str, Any]:
    """What a file of figures begins with: the command that printed them, and what it ran on."""
    return {
        "command": shlex.join(command),
        "hardware": hardware(torch.device(device)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a measurement ran on."""
    return {
        "dycoke": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def hardware(device: torch.device) -> str:
    """The name of a device, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
