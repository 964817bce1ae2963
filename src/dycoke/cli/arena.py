"""``dycoke eval --retentions``: methods at the same shares of the visual tokens."""

from __future__ import annotations

from pathlib import Path

from dycoke.cli.console import BadInput, out, progress_bars
from dycoke.cli.evaluate import Stories
from dycoke.cli.options import comma_separated


def over_retentions(
    stories: Stories, retentions: str, methods: str | None, against: str, picture: Path | None
) -> None:
    """Run, print and draw every method at every share."""
    import importlib.util

    from dycoke.evaluate import curves, retention
    from dycoke.precision import name_of

    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--picture needs matplotlib: pip install 'dycoke[plot]'")
    names = retention.USUAL if methods is None else comma_separated(methods)
    try:
        points = retention.points(names, _shares(retentions))
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    if against not in names and (methods is not None and against != "dycoke"):
        raise BadInput(f"--against {against}: it is none of the methods {', '.join(names)}")
    assistant = stories.load()
    lines = list(dict.fromkeys(point.setting for point in points))
    with progress_bars() as bars:
        scores = stories.answer(assistant, lines, bars)
    rows = retention.point_results(points, scores, against)
    title = f"{stories}, {stories.model or 'nano'}"
    for table in curves.accuracy_tables(rows, title):
        out.print(table)
    out.print(curves.LEGEND.format(against))
    if picture is not None:
        curves.picture(rows, title).savefig(picture, format="png")
        out.print(f"saved {picture}: accuracy over retention")
    stories.save(dtype=name_of(assistant.model.dtype), against=against, results=rows)


def _shares(text: str) -> list[float]:
    """Numbers in (0, 1], separated by commas; numbers above 1 were percent once."""
    try:
        shares = [float(part) for part in comma_separated(text)]
    except ValueError:
        shares = []
    if not shares:
        raise BadInput(f"--retentions must be shares in (0, 1], such as 0.5,0.25, got {text!r}")
    wrong = [share for share in shares if not 0 < share <= 1]
    if not wrong:
        return shares
    message = f"--retentions must be shares in (0, 1], got {text}"
    if all(0 < share <= 100 for share in shares) and all(share > 1 for share in wrong):
        meant = (share / 100 if share in wrong else share for share in shares)
        message += f"; did you mean {','.join(f'{share:g}' for share in meant)}?"
    raise BadInput(message)
