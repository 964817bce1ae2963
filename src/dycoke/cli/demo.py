"""``dycoke demo``: a rendered story, told by the embedded model, and where it looked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dycoke.cli.console import out
from dycoke.cli.session import Session, load_assistant, read_video, report_table


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

    story, settings = stories.make("seen", seed), DyCoke()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "story.mp4"
        stories.write(story, path)
        video, video_s = read_video(path, stories.FRAMES)
    assistant = load_assistant(None, None, None, own_world=True)
    session = Session(assistant, video, video_s, stories.DESCRIBE[0], 64)
    out.print(f"[bold]truth:[/bold] {stories.describe(story)}")
    session.warm_up()
    full, answer = session.ask(None), session.ask(settings)
    out.print(report_table(answer, full, session.title(settings)))

    from dycoke.picture import draw

    traced = assistant.ask(video, session.prompt, settings, max_new_tokens=64, trace=True)
    assert traced.trace is not None
    sample = traced.trace.samples[0]
    side = round(sample.keep[0].shape[1] ** 0.5)
    title = f"truth: {stories.describe(story)}\nDyCoke: {traced.text[:200]}"
    draw(video.frames, sample, traced.tokens, title, (side, side)).save(picture)
    out.print(f"saved {picture}: kept tokens, and the frames that each word looked at")
