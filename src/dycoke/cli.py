"""The ``dycoke`` command. Thin: picks defaults, shows results; each command imports its own needs.

stdout carries the result, stderr everything else. Exit codes: 0 right, 2 bad input or usage (one
line on stderr), 1 a fault of ours.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dycoke.assistant import Answer, Assistant
    from dycoke.compressor import Compressor
    from dycoke.video import Video

app = typer.Typer(
    name="dycoke",
    help="Fast video large language models without training.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STREAM = "Stream of the file to read, by its number [default: the one a person would watch]"
PIXELS = "Most pixels of all sampled frames together; larger ones are scaled down."
BUDGET = "Visual tokens to keep, instead of a merge ratio: 1000 (tokens) or 0.25 (share)."
LOOKED = 50  # stories whose attention `eval` traces: one after another, so not all of them

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


# Newer typer carries its own copy of click, so the class is taken from where typer has it.
UsageProblem: type[Any] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


class BadInput(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


def main() -> None:
    """Entry point: maps every outcome to an exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _say("interrupted", 130)
    except UsageProblem as error:
        code = _say(f"{error.format_message()} (see dycoke --help)", 2)
    except BadInput as error:
        code = _say(str(error), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())  # one line, whatever a library's message looks like
    err.print(f"dycoke: {line}", soft_wrap=True, markup=False)
    return code


def _version(value: bool) -> None:
    if value:
        from dycoke import __version__

        out.print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fast video large language models without training."""
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)


@app.command()
def run(
    video: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to ask about the video.")
    ] = "Describe what happens in this video.",
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a checkpoint [default: the embedded nano model]"),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to sample.")] = 32,
    stream: Annotated[int | None, typer.Option(min=0, help=STREAM)] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help=PIXELS)] = 1 << 28,
    encode_frames: Annotated[
        str,
        typer.Option(help="Most frames that the vision encoder takes at once, or auto: by memory."),
    ] = "auto",
    merge_ratio: Annotated[
        float, typer.Option(help="Share of a non-anchor frame's tokens to merge, [0, 1).")
    ] = 0.7,
    token_budget: Annotated[str | None, typer.Option(help=BUDGET)] = None,
    prune_ratio: Annotated[
        float, typer.Option(help="Share of visual tokens a decode step leaves out, [0, 1).")
    ] = 0.7,
    prune_layer: Annotated[int, typer.Option(help="First decoder layer that leaves them out.")] = 3,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run without compression, and compare.")
    ] = False,
    no_compress: Annotated[
        bool, typer.Option("--no-compress", help="Run the model as it is.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 128,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1, mps, cpu [default: the best there is]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16 [default: by device]")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """Ask a video LLM about a video, with DyCoke."""
    if compare and no_compress:
        raise BadInput("--compare and --no-compress exclude each other; drop one")
    at_once = _encode_frames(encode_frames)
    clip, video_s = _read(
        video, frames, stream, max_pixels
    )  # first, since a bad file can be told at once
    settings = _settings(merge_ratio, prune_ratio, prune_layer, _budget(token_budget))
    assistant = _load(model, device, dtype)
    session = _Session(assistant, clip, video_s, prompt, max_new_tokens, as_json, at_once)
    if compare:
        session.warm_up()
    full = session.ask(None) if compare or no_compress else None
    ours = None if no_compress else session.ask(settings)
    if as_json:
        result = _as_dict(ours or full)
        if compare:
            result["full"] = _as_dict(full)
        # Not through rich, which would wrap it.
        print(json.dumps(result))
    elif ours is not None:
        out.print(_table(ours, full))
    else:
        out.print(_table(full, None))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Which story to render.")] = 0,
    picture: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path(
        "dycoke-demo.png"
    ),
) -> None:
    """Render a short story, ask the embedded model what happens, and draw where it looked."""
    import tempfile

    from dycoke.nano import stories

    story = stories.make("seen", seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story.mp4"
        stories.write(story, path)
        clip, video_s = _read(path, stories.FRAMES)
    settings = _settings(0.7, 0.7, 3)
    assistant = _load(None, None, None, own_world=True)
    session = _Session(assistant, clip, video_s, stories.DESCRIBE[0], 64, quiet=False)
    out.print(f"[bold]truth:[/bold] {stories.describe(story)}")
    session.warm_up()
    full, ours = session.ask(None), session.ask(settings)
    out.print(_table(ours, full))

    from dycoke.picture import draw

    traced = assistant.ask(clip, session.prompt, settings, max_new_tokens=64, trace=True)
    assert traced.trace is not None
    sample = traced.trace.samples[0]
    side = round(sample.keep[0].shape[1] ** 0.5)
    title = f"truth: {stories.describe(story)}\nDyCoke: {traced.text[:200]}"
    draw(clip.frames, sample, traced.tokens, title, (side, side)).save(picture)
    out.print(f"saved {picture}: kept tokens, and the frames that each word looked at")


@app.command("eval")
def evaluate(
    count: Annotated[int, typer.Option("--stories", min=1, help="How many stories.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first story.")] = 0,
    split: Annotated[str, typer.Option(help="seen or unseen (combinations).")] = "seen",
    settings: Annotated[
        str | None,
        typer.Option(help="Only lines whose names begin so, comma-separated: full,once,dycoke"),
    ] = None,
    merge_ratio: Annotated[
        float | None, typer.Option(help="Only this merge ratio [default: .3, .5 and .7]")
    ] = None,
    token_budget: Annotated[str | None, typer.Option(help=BUDGET)] = None,
    prune_ratio: Annotated[float, typer.Option(help="Share that a decode step leaves out.")] = 0.7,
    prune_layer: Annotated[int, typer.Option(help="First decoder layer that is pruned.")] = 3,
    retentions: Annotated[
        str | None,
        typer.Option(
            help="Instead: methods at these shares of the visual tokens, in percent: 50,25,15,10,5"
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="With --retentions: names from dycoke methods, or two joined by a +, such as "
            "visionzip+dycoke [default: all but always]",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(help="With --retentions: the method that the others are compared with.")
    ] = "dycoke",
    picture: Annotated[
        Path | None, typer.Option(help="With --retentions: draw accuracy over retention here.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory of another nano model.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each; 1 uses this process alone.")
    ] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write results here; unfinished ones are kept beside it."),
    ] = None,
) -> None:
    """StoryQA: the embedded model's accuracy, full, compressed, and under controls."""
    if split not in ("seen", "unseen"):
        raise BadInput(f"--split must be seen or unseen, got {split!r}")
    if retentions is None and (names, picture) != (None, None):
        raise BadInput("--methods and --picture go with --retentions, such as 50,25,15,10,5")
    if retentions is not None:
        if settings is not None:
            raise BadInput(
                "--settings chooses among the standard lines; with --retentions say --methods"
            )
        which = (split, seed, count, model, workers)
        _over_retention(retentions, names, against, which, json_file, picture)
        return
    budget = _budget(token_budget)
    assistant = _load(model, None, None, own_world=True)
    from dycoke.evaluate import storyqa

    if merge_ratio is not None and budget is not None:
        raise BadInput("--merge-ratio and --token-budget exclude each other; drop one")
    sizes: list[dict[str, Any]] = [{"merge_ratio": ratio} for ratio in (0.3, 0.5, 0.7)]
    if merge_ratio is not None:
        sizes = [{"merge_ratio": merge_ratio}]
    if budget is not None:
        sizes = [{"token_budget": budget}]
    try:
        lines = storyqa.standard_settings(sizes, prune_ratio, prune_layer)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    if settings is not None:
        wanted = tuple(part.strip() for part in settings.split(",") if part.strip())
        known = ", ".join(line.name for line in lines)
        lines = [line for line in lines if line.name.startswith(wanted)]
        if not lines:
            raise BadInput(f"no setting begins with {settings!r}; there are {known}")
    with _bars() as bars:
        which = (split, seed, count, model, workers)
        scores = _answers(assistant, lines, which, json_file, bars)
        from dycoke.evaluate.attention import looking

        looked = min(count, LOOKED)
        task = bars.add_task("where full looks", total=1)
        look = looking(assistant, split, seed, looked, prune_layer)
        bars.advance(task)
    results = storyqa.results(lines, scores)
    out.print(_accuracies(results, f"StoryQA, {count} {split} stories from seed {seed}"))
    inside = look.inside / max(look.words, 1)
    out.print(
        f"words whose most attended frame lies in the event being told: {inside:.1%} of "
        f"{look.words} (by chance {look.chance:.1%}), full model, {look.stories} stories"
    )
    if json_file is not None:
        content = {"stories": count, "seed": seed, "split": split, "results": results}
        content["attention"] = vars(look)
        _finish(content, json_file)


Which = tuple[str, int, int, str | None, int]
"""Split, first seed, number of stories, the model's folder, processes."""


def _bars() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, Left(), console=err)


def _answers(
    assistant: Assistant, lines: Any, which: Which, json_file: Path | None, bars: Any
) -> Any:
    """Scores under every setting; unfinished ones are kept beside ``json_file``."""
    from dycoke.evaluate import storyqa

    split, seed, count, model, workers = which
    task = bars.add_task(f"{len(lines)} settings", total=count * len(lines))
    return storyqa.evaluate(
        assistant,
        lines,
        split,
        seed,
        count,
        None if json_file is None else _partial(json_file),
        model or "nano",
        lambda name, done: bars.update(task, advance=done, description=name),
        workers,
    )


def _partial(json_file: Path) -> Path:
    return json_file.with_name(json_file.name + ".partial")


def _finish(content: dict[str, Any], json_file: Path) -> None:
    json_file.write_text(json.dumps(content, indent=1) + "\n")
    _partial(json_file).unlink(missing_ok=True)


def _over_retention(
    shares: str,
    names: str | None,
    against: str,
    which: Which,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Every method at the same shares of the visual tokens."""
    import importlib.util

    from dycoke.evaluate import curves, retention

    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--picture needs matplotlib: pip install 'dycoke[plot]'")
    try:
        parts = [float(part) / 100 for part in shares.split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"--retentions must be percentages, 50,25,10, got {shares!r}") from None
    wanted = retention.USUAL
    if names is not None:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
    try:
        points = retention.points(wanted, parts)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    if names is not None and against != "dycoke" and against not in wanted:
        raise BadInput(f"--against {against}: it is none of the methods {', '.join(wanted)}")
    split, seed, count, model, _ = which
    assistant = _load(model, None, None, own_world=True)
    with _bars() as bars:
        lines = list(dict.fromkeys(point.setting for point in points))
        scores = _answers(assistant, lines, which, json_file, bars)
    rows = retention.results(points, scores, against)
    title = f"StoryQA, {count} {split} stories from seed {seed}, {model or 'nano'}"
    for table in curves.tables(rows, title):
        out.print(table)
    out.print(curves.LEGEND.format(against))
    if picture is not None:
        curves.picture(rows, title).savefig(picture, format="png")
        out.print(f"saved {picture}: accuracy over retention")
    if json_file is not None:
        content = {"stories": count, "seed": seed, "split": split, "against": against}
        _finish({**content, "results": rows}, json_file)


@app.command()
def bench(
    arch: Annotated[
        str | None, typer.Option(help="True shapes with random weights: llava-onevision-7b, ...")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a checkpoint [default: the embedded nano model]"),
    ] = None,
    names: Annotated[
        str, typer.Option("--methods", help="Comma-separated; see dycoke methods.")
    ] = "full,dycoke",
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of the visual tokens to remove [default: each method's own]"),
    ] = None,
    video: Annotated[Path | None, typer.Option(help="[default: a rendered story]")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to sample.")] = 32,
    stream: Annotated[int | None, typer.Option(min=0, help=STREAM)] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help=PIXELS)] = 1 << 28,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Measured turns of all methods.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Copies of the prompt in a batch.")] = 1,
    layers: Annotated[
        int | None, typer.Option(help="Cut an architecture's language model; the output says so.")
    ] = None,
    vision_layers: Annotated[
        int | None, typer.Option(help="Cut an architecture's vision encoder; the output says so.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1, mps, cpu [default: the best there is]")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Such as flash_attention_2 [default: transformers' choice]")
    ] = None,
    peak: Annotated[
        bool, typer.Option(help="On the CPU, measure each method's peak memory in a process.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here, too.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where to save the bars.")] = Path(
        "dycoke-bench.png"
    ),
    check_paper: Annotated[
        bool, typer.Option("--check-paper", help="Print the paper's FLOPs and ours, and stop.")
    ] = False,
) -> None:
    """Speed and memory of the methods, stage by stage; one line of JSON comes last."""
    from dycoke.bench import show

    if check_paper:
        out.print(show.paper_flops())
        return
    import shlex

    from transformers.utils import logging

    from dycoke.bench.arch import arch_of
    from dycoke.bench.plan import Plan, clip
    from dycoke.bench.results import measure
    from dycoke.bench.speed import BenchError
    from dycoke.errors import UnsupportedError
    from dycoke.video import VideoError

    logging.disable_progress_bar()
    if arch is not None and model is not None:
        raise BadInput("--arch and --model exclude each other; drop one")
    if arch is None and (layers, vision_layers) != (None, None):
        raise BadInput("--layers and --vision-layers cut random weights only; name an --arch")
    for file in (json_file, picture):
        if file is not None and not file.resolve().parent.is_dir():
            raise BadInput(f"cannot write {file}: there is no such folder")
    try:
        plan = Plan(
            methods=tuple(part.strip() for part in names.split(",") if part.strip()),
            arch=None if arch is None else arch_of(arch).cut(layers, vision_layers),
            model=model,
            video=None if video is None else str(video),
            frames=frames,
            stream=stream,
            max_pixels=max_pixels,
            new_tokens=new_tokens,
            repeat=repeat,
            batch=batch,
            ratio=ratio,
            device=device,
            attention=attention,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    try:
        with clip(plan) as path, err.status("building the model") as status:

            def tell(what: str) -> None:
                status.update(what)
                if not err.is_terminal:  # a log of a long run should show that it goes on
                    err.print(what, markup=False)

            head, rows = measure(plan, path, shlex.join(["dycoke", *sys.argv[1:]]), tell, peak)
    except (VideoError, UnsupportedError, BenchError) as error:
        raise BadInput(str(error)) from None
    for table in show.tables(head, rows):
        out.print(table)
    show.bars(head, rows).save(picture, format="PNG")
    out.print(f"saved {picture}: seconds per stage")
    content = {**head, "results": rows}
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


@app.command("methods")
def list_methods() -> None:
    """List the methods that bench and eval know by name."""
    from dycoke.methods import METHODS

    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("where")
    for method in METHODS.values():
        table.add_row(method.name, method.about, ", ".join(method.where))
    out.print(table)
    out.print(
        "vision: by the vision encoder's attention; inside: in the LLM, at prefill.\n"
        "visionzip+dycoke composes two: the tokens of one, the dynamic cache of the other.\n"
        "The classes are in dycoke.methods."
    )


@app.command()
def flops() -> None:
    """The same as bench --check-paper: the paper's FLOPs, and ours."""
    from dycoke.bench.show import paper_flops

    out.print(paper_flops())


@app.command()
def models() -> None:
    """Print the model families that can be compressed, and what does not apply to each."""
    from dycoke.models import families, limits

    table = Table(title="merging and pruning work on all of these", show_lines=True)
    table.add_column("family (config.model_type), and checkpoints", no_wrap=True)
    table.add_column("RoPE")
    table.add_column("limits")
    for family in dict.fromkeys(families().values()):
        name = f"{family.name}\n({', '.join(family.model_types)})"
        checkpoints = "".join(f"\n  {checkpoint}" for checkpoint in family.checkpoints)
        table.add_row(name + checkpoints, family.rope, "\n".join(limits(family)))
    out.print(table, markup=False)
    out.print("Any other family: DyCoke(...)(model, layout=...), see the README.")


def _read(
    path: Path, frames: int, stream: int | None = None, max_pixels: int = 1 << 28
) -> tuple[Video, float]:
    """Frames of a file, and the seconds that it took."""
    import time

    from dycoke.video import VideoError, read

    began = time.perf_counter()
    with err.status("decoding frames") as status:

        def show(done: int, of: int) -> None:
            status.update(f"decoding frames: {done}/{of}")

        try:
            clip = read(path, frames, show, stream, max_pixels)
        except VideoError as error:
            raise BadInput(str(error)) from None
    for note in clip.notes:
        err.print(f"note: {path}: {note}", soft_wrap=True, markup=False)
    return clip, time.perf_counter() - began


def _encode_frames(value: str) -> int | str:
    """ "auto", or a number of at least 2."""
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 2:
        raise BadInput(f"--encode-frames must be auto or a number of at least 2, got {value!r}")
    return int(value)


def _budget(text: str | None) -> int | float | None:
    """A number of tokens, or a share: 1 is one token, 1.0 is all."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"--token-budget must be a number, got {text!r}") from None


def _settings(
    merge_ratio: float,
    prune_ratio: float,
    prune_layer: int,
    token_budget: int | float | None = None,
) -> Compressor:
    from dycoke.methods import DyCoke

    try:
        return DyCoke(merge_ratio, prune_ratio, prune_layer, token_budget=token_budget)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None


def _load(
    model: str | None, device: str | None, dtype: str | None, own_world: bool = False
) -> Assistant:
    if model is not None and not Path(model).is_dir() and _looks_like_a_path(model):
        raise BadInput(f"no model at {model}: there is no such directory")
    with err.status("loading the model"):
        from transformers.utils import logging

        from dycoke import nano
        from dycoke.assistant import Assistant

        logging.disable_progress_bar()
        if model is None and not nano.is_trained():
            err.print(
                "note: the embedded model has random weights for now, so its words mean nothing; "
                "name a real one with --model"
            )
        elif model is None and not own_world:
            err.print(
                "note: the embedded model only knows its own little world of moving shapes; for "
                "any other clip name a real one with --model"
            )
        try:
            return Assistant.load(model, device, dtype)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise BadInput(f"cannot load the model {model!r}: {error}") from None


@dataclass
class _Session:
    """One model, one clip, one question; asked once or twice."""

    assistant: Assistant
    video: Video
    video_s: float
    prompt: str
    max_new_tokens: int
    quiet: bool
    encode_frames: int | str = "auto"

    def warm_up(self) -> None:
        """Run once without timing, or whichever comes first would pay for starting up."""
        from dycoke.errors import UnsupportedError

        with err.status("warming up"):
            try:
                self.assistant.ask(
                    self.video, self.prompt, max_new_tokens=2, encode_frames=self.encode_frames
                )
            except UnsupportedError as error:
                raise BadInput(str(error)) from None

    def ask(self, compressor: Compressor | None) -> Answer:
        from dycoke.errors import UnsupportedError

        name = "full" if compressor is None else "DyCoke"
        with err.status(f"{name}: encoding {len(self.video.frames)} frames") as status:
            started = False

            def show(text: str) -> None:
                nonlocal started
                if not started:
                    started = True
                    status.stop()
                    out.print(f"[bold]{name}:[/bold] ", end="")
                out.print(text, end="", markup=False, soft_wrap=True)

            try:
                answer = self.assistant.ask(
                    self.video,
                    self.prompt,
                    compressor,
                    max_new_tokens=self.max_new_tokens,
                    on_text=None if self.quiet else show,
                    encode_frames=self.encode_frames,
                )
            except UnsupportedError as error:
                raise BadInput(str(error)) from None
        if started:
            out.print()
        answer.timings.video_s += self.video_s
        answer.timings.total_s += self.video_s
        return answer


def _looks_like_a_path(model: str) -> bool:
    """Hub ids are "name" or "owner/name"."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def _as_dict(answer: Answer | None) -> dict[str, Any]:
    assert answer is not None
    return {
        "text": answer.text,
        "report": None if answer.report is None else answer.report.to_dict(),
        "timings": answer.timings.to_dict(),
    }


def _accuracies(results: list[dict[str, Any]], title: str) -> Table:
    """Accuracies with their intervals, and differences to the full model."""
    table = Table(title=f"{title}; % right [95 % interval] (difference to full)")
    for name in ("", "kept", "attended", "ask", "describe"):
        table.add_column(name, justify="left" if not name else "right")
    for result in results:
        cells = [f"{result['retention']:.1%}", f"{result['final_retention']:.1%}"]
        for task in ("ask", "describe"):
            r = result[task]
            low, high = (f"{100 * r[k]:.1f}" for k in ("low", "high"))
            text = f"{100 * r['correct'] / r['n']:.1f} [{low}, {high}]"
            if (d := r.get("to_full")) is not None:
                text += f"\n({100 * d[0]:+.1f} [{100 * d[1]:+.1f}, {100 * d[2]:+.1f}])"
            cells.append(text)
        table.add_row(result["name"], *cells)
    return table


def _table(answer: Answer | None, full: Answer | None) -> Table:
    """The report and the times; beside those of the full model, where there are such."""
    assert answer is not None
    table = Table(title="DyCoke" if answer.report else "without compression")
    table.add_column()
    if full is not None:
        table.add_column("full", justify="right")
    table.add_column("DyCoke" if answer.report else "full", justify="right")
    if full is not None:
        table.add_column("ratio", justify="right")

    def line(name: str, ours: float, whole: float, form: Any) -> None:
        cells = [form(ours)]
        if full is not None:
            ratio = f"{whole / ours:.2f}x" if ours else "-"
            cells = [form(whole), form(ours), ratio]
        table.add_row(name, *cells)

    report = answer.report
    if report is not None:
        visual = sum(s.visual_tokens for s in report.samples)
        kept = sum(s.kept_tokens for s in report.samples)
        active = sum(s.active_tokens for s in report.samples)
        line("visual tokens prefilled", kept, visual, str)
        line("visual tokens attended", active, visual, str)
        line("KV cache, KiB", report.kv_bytes / 1024, report.kv_bytes_full / 1024, "{:.0f}".format)
        if full is None:
            table.add_row("of visual tokens", str(visual))
            table.add_row("refreshes", str(sum(s.refreshes for s in report.samples)))
            table.add_row("tokens recalled", str(sum(s.recalled_tokens for s in report.samples)))
        if report.reason:
            table.caption = f"not compressed: {report.reason}"
    for name, key in (
        ("video decoding, s", "video_s"),
        ("vision encoder, s", "vision_s"),
        ("compression, s", "compress_s"),
        ("prefill, s", "prefill_s"),
        ("time to first token, s", "ttft_s"),
        ("time per token, s", "per_token_s"),
        ("total, s", "total_s"),
    ):
        whole = 0.0 if full is None else getattr(full.timings, key)
        line(name, getattr(answer.timings, key), whole, "{:.3f}".format)
    return table
