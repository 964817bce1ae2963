"""``dycoke demo``: a rendered story, told by the embedded model, and where it looked."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dycoke.cli.console import out
from dycoke.cli.session import STAGE_ROWS, Session, load_assistant

if TYPE_CHECKING:
    from dycoke.assistant import Answer
    from dycoke.nano.stories import Story

TURNS = 3  # of all methods, one after the other
MAX_NEW_TOKENS = 64


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Which story to render.")] = 0,
    picture: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path(
        "dycoke-demo.png"
    ),
) -> None:
    """Render a short story, ask the embedded model what happens, and draw where it looked."""
    import tempfile

    from dycoke.methods.dycoke import DyCoke
    from dycoke.nano import stories
    from dycoke.picture import draw
    from dycoke.video import read

    story = stories.make("seen", seed)
    assistant = load_assistant(None, None, None, own_world=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story.mp4"
        stories.write(story, path)
        video = read(path, stories.FRAMES)
        session = Session(assistant, video, 0.0, stories.DESCRIBE[0], MAX_NEW_TOKENS)
        out.print(f"[bold]truth:[/bold] {stories.describe(story)}")
        session.warm_up()
        methods = {"full": None, "DyCoke": DyCoke(), "DyCoke+": DyCoke.plus()}
        answers: dict[str, list[Answer]] = {name: [] for name in methods}
        for turn in range(TURNS):
            session.quiet = turn > 0
            for name, method in methods.items():
                began = time.perf_counter()
                session.video = read(path, stories.FRAMES)  # part of what an answer takes
                session.decode_s, session.method = time.perf_counter() - began, name
                answers[name].append(session.ask(method))
    out.print(_compared(answers, story))

    traced = assistant.ask(
        video, session.prompt, methods["DyCoke+"], max_new_tokens=MAX_NEW_TOKENS, trace=True
    )
    assert traced.trace is not None
    sample = traced.trace.samples[0]
    side = round(sample.keep[0].shape[1] ** 0.5)
    title = f"truth: {stories.describe(story)}\nDyCoke+: {traced.text[:200]}"
    draw(video.frames, sample, traced.tokens, title, (side, side)).save(picture)
    out.print(f"saved {picture}: kept tokens, and the frames that each word looked at")


def _compared(answers: dict[str, list[Answer]], story: Story) -> Table:
    """What each method told, held and took; the first one is the full model."""
    from dycoke.nano import stories

    table = Table(title=f"medians of {TURNS} turns, one method after the other (ratio to full)")
    table.add_column()
    for name in answers:
        table.add_column(name, justify="right")
    firsts = [made[0] for made in answers.values()]
    events = len(story.events)
    right = (f"{stories.events_right(a.text, story)} of {events}" for a in firsts)
    table.add_row("events told right", *right)
    reports = [a.report for a in firsts]
    whole = next(r.samples[0].visual_tokens for r in reports if r is not None)
    for title, key in (
        ("visual tokens prefilled", "kept_tokens"),
        ("visual tokens attended", "active_tokens"),
    ):
        counts = (whole if r is None else r.samples[0][key] for r in reports)
        table.add_row(title, *map(str, counts))
    # Longer answers hold more: each beside what a stock cache would hold behind the same answer.
    held = (
        "-" if r is None else f"{r.kv_bytes / 1024:.0f} of {r.kv_bytes_full / 1024:.0f}"
        for r in reports
    )
    table.add_row("KV cache, KiB", *held)
    for title, key in STAGE_ROWS.items():
        seconds = [median(getattr(a.timings, key) for a in made) for made in answers.values()]
        cells = [f"{s:.4f}" if key == "per_token_s" else f"{s:.3f}" for s in seconds]
        if key in ("prefill_s", "per_token_s", "total_s"):
            cells[1:] = [
                f"{c} ({seconds[0] / s:.2f}x)" for c, s in zip(cells[1:], seconds[1:], strict=True)
            ]
        table.add_row(title, *cells)
    return table
