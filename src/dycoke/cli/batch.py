"""``dycoke batch``: questions about many videos, with rows that survive what kills a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dycoke.cli import options
from dycoke.cli.console import BadInput, err, out

if TYPE_CHECKING:
    from dycoke.batch.drive import Runner
    from dycoke.batch.items import Item
    from dycoke.batch.join import Summary
    from dycoke.batch.shards import Folder
    from dycoke.batch.worker import Plan, Spec

DESCRIBE = "Describe what happens in this video."


def batch(
    videos: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, globs, manifests (.txt, .jsonl, .csv, .parquet), tars, files.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to ask about each video that brings no prompt of its own; several share "
            f"what the video costs [default: {DESCRIBE}]",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the rows; or a .jsonl or .parquet file, with its parts beside it.",
        ),
    ] = Path("out"),
    model: options.Model = None,
    method: Annotated[str, typer.Option(help="By its name, see dycoke methods.")] = "dycoke",
    retention: options.Retention = None,
    frames: options.FrameCount = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 128,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most videos that are answered together.")
    ] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Videos in one part of the output.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes [default: one per GPU, at least one]")
    ] = None,
    runner: Annotated[str, typer.Option(help="local or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="ray: the cluster's address [default: one on this machine]")
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="ray: GPUs of each worker [default: 1 where the cluster has any]"),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: the share of one of n jobs, i from 0, as of a Slurm array."),
    ] = None,
    max_attempts: Annotated[
        int,
        typer.Option(min=1, help="Processes that may die over a video before its row says so."),
    ] = 2,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Take up the videos again that failed.")
    ] = False,
    fail_over: Annotated[
        str | None,
        typer.Option(help="Exit with 1 where more rows than this failed, such as 5%."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Only join the rows of all jobs: into --out, or rows.jsonl in that folder.",
        ),
    ] = False,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16 [default: by device]")] = None,
) -> None:
    """Ask about many videos, and go on exactly where a run was broken off."""
    from dycoke.batch.items import BatchError
    from dycoke.batch.manifest import read_inputs
    from dycoke.batch.shards import Folder, Slice

    if runner not in ("local", "ray"):
        raise BadInput(f"--runner must be local or ray, got {runner!r}")
    limit = _share(fail_over)
    joined = _file_of(output)
    options.check_folder(output)
    folder = Folder(output if joined is None else f"{output}.parts")
    try:
        if join:
            _join(folder, joined or output / "rows.jsonl")
            _end(_whole(folder), folder, limit, fail_over)
            return
        slice = None if shard is None else Slice.parse(shard)
        prompts = prompt or [DESCRIBE]
        items = read_inputs(videos or [], prompts, frames)
        spec, settings = _spec(
            model, device, dtype, method, retention, max_new_tokens, prompts, frames
        )
        whole = _drive(
            items,
            folder,
            settings,
            _runner(
                runner, spec, folder, _plan(batch_size, max_attempts), workers, ray_address, gpus
            ),
            shard_size,
            slice,
            retry_failed,
        )
        if joined is not None and slice is None:
            _join(folder, joined)
    except BatchError as error:
        raise BadInput(str(error)) from None
    _end(whole, folder, limit, fail_over)


def _file_of(output: Path) -> Path | None:
    """The file that rows are joined in; None for a folder that keeps its parts."""
    from dycoke.batch.items import BatchError, pyarrow
    from dycoke.batch.join import JOINED

    if output.suffix in (".json", ".csv", ".tsv", ".txt") and not output.is_dir():
        raise BadInput(f"--out {output}: rows are joined to a {' or '.join(JOINED)} file")
    if output.suffix == ".parquet":
        try:
            pyarrow(output)  # now, and not when all work is done
        except BatchError as error:
            raise BadInput(str(error)) from None
    return output if output.suffix in JOINED else None


def _end(whole: Summary, folder: Folder, limit: float | None, fail_over: str | None) -> None:
    _say(whole, folder)
    if limit is not None and whole.failed_share > limit:
        err.print(f"{whole.failed_share:.1%} of the rows failed, more than --fail-over {fail_over}")
        raise typer.Exit(1)


def _whole(folder: Folder) -> Summary:
    from dycoke.batch.join import summary

    return summary(folder, range(folder.settings()["shards"]))


def _share(text: str | None) -> float | None:
    """5% or 0.05."""
    if text is None:
        return None
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise BadInput(f"--fail-over must be a share such as 5% or 0.05, got {text!r}")
    return share


def _spec(
    model: str | None,
    device: str | None,
    dtype: str | None,
    method: str,
    retention: float | None,
    max_new_tokens: int,
    prompts: Sequence[str],
    frames: int,
) -> tuple[Spec, dict[str, Any]]:
    """How a worker makes its model, and all that answers depend on."""
    from dycoke.batch.answering import NANO, ModelSpec

    compressor = options.method_of(method, retention, {})
    made = ModelSpec(model, device, dtype, compressor, method, max_new_tokens)
    settings = {
        "model": model or NANO,
        "dtype": dtype,
        "method": method,
        "settings": {} if compressor is None else compressor.to_dict(),
        "frames": frames,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
    }
    return made, settings


def _plan(batch_size: int, max_attempts: int) -> Plan:
    from dycoke.batch.worker import Plan

    return Plan(batch_size, max_attempts)


def _runner(
    name: str,
    spec: Spec,
    folder: Folder,
    plan: Plan,
    workers: int | None,
    address: str | None,
    gpus: float | None,
) -> Runner:
    if name == "ray":
        from dycoke.batch.on_ray import run_ray

        return partial(run_ray, spec, folder, plan, workers, address=address, gpus=gpus)
    import torch

    from dycoke.batch.local import run_local

    return partial(run_local, spec, folder, plan, workers or max(1, torch.cuda.device_count()))


def _drive(
    items: Sequence[Item],
    folder: Folder,
    settings: Mapping[str, Any],
    runner: Runner,
    shard_size: int,
    slice: Any,
    retry_failed: bool,
) -> Summary:
    from dycoke.batch.drive import drive

    return drive(items, folder, settings, runner, shard_size, slice, retry_failed, err)


def _join(folder: Folder, target: Path) -> None:
    from dycoke.batch.join import join

    count = join(folder, target)
    err.print(f"{count} rows in {target}", soft_wrap=True, markup=False)


def _say(whole: Summary, folder: Folder) -> None:
    """What it came to, and where the time went."""
    failed = whole.failed.total()
    out.print(f"{whole.rows} rows in {folder.path}, {failed} failed", soft_wrap=True, markup=False)
    for kind, count in whole.failed.most_common():
        out.print(f"  {count} {kind}", markup=False)
    answered = whole.rows - failed
    if answered:
        parts = ", ".join(
            f"{name} {whole.seconds[name] / answered:.3f}"
            for name in ("decode", "encode", "prefill", "total")
        )
        out.print(f"seconds per answer: {parts}", markup=False)
