"""Accuracy over retention for people: tables for the terminal, and a picture with a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dycoke.evaluate.retention import BASES
from dycoke.evaluate.storyqa import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


def _of(rows: Sequence[Result], basis: str) -> dict[str, dict[float, Result]]:
    """Method -> share -> its row, for one basis; without the full model."""
    table: dict[str, dict[float, Result]] = {}
    for row in rows:
        if basis in row["bases"] and row["method"] != "full":
            table.setdefault(row["method"], {})[row["target_retention"]] = row
    return table


def _percent(row: Result, task: str) -> float:
    return 100 * float(row[task]["correct"]) / float(row[task]["n"])


def verdict(row: Result, task: str, basis: str) -> str:
    """How a method compares with its rival at the same share: "+", "-", or " " for neither.

    Only what the interval of the paired difference allows is claimed.
    """
    against = row[task].get("to_rival", {}).get(basis)
    if against is None:
        return " "
    _, low, high = against
    return "+" if low > 0 else "-" if high < 0 else " "


def accuracy_tables(rows: Sequence[Result], title: str) -> list[Table]:
    """A table per task and basis: methods down, shares across."""
    full = next((row for row in rows if row["method"] == "full"), None)
    made = []
    for task in TASKS:
        for basis in BASES:
            shown = _of(rows, basis)
            shares = sorted({s for by in shown.values() for s in by}, reverse=True)
            head = f"{task}: % right at equal {basis} tokens"
            if full is not None:
                head += f"; full {_percent(full, task):.1f}"
            table = Table(title=f"{title}\n{head}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            table.add_column("method \\ retention", no_wrap=True)
            for share in shares:
                table.add_column(f"{share:.4g}", justify="right", no_wrap=True)
            for method, by in shown.items():
                cells = [_cell(by[s], task, basis) if s in by else "" for s in shares]
                table.add_row(method, *cells)
            made.append(table)
    return made


def _cell(row: Result, task: str, basis: str) -> str:
    mark = "" if row["reached"] else f" (at {row['retention']:.3g})"
    return f"{_percent(row, task):.1f}{mark} {verdict(row, task, basis)}"


LEGEND = (
    "+ and -: above and below {} at the same share by a paired, story-clustered 95 % interval; "
    "(at x): the method cannot keep fewer than x"
)


def picture(rows: Sequence[Result], title: str) -> Figure:
    """Accuracy over retention: a panel per task and basis, a line per method.

    Shaded are 95 % Wilson intervals; an open mark is a share that the method could not reach.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), dpi=110, layout="constrained")
    panels = figure.subplots(len(TASKS), len(BASES), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "full"))
    full = next((row for row in rows if row["method"] == "full"), None)
    marks, lines = "osD^v<>Pp*Xhd", ("-", "--", ":")
    for i, task in enumerate(TASKS):
        for j, basis in enumerate(BASES):
            panel = panels[i][j]
            if full is not None:
                panel.axhline(_percent(full, task), color="black", lw=1, ls=":", label="full")
            for method, by in _of(rows, basis).items():
                place = names.index(method)
                ours = method.endswith(("dycoke", "dycoke+"))
                shares = sorted(by)
                x = [by[s]["retention" if basis == "kept" else "target_retention"] for s in shares]
                y = [_percent(by[s], task) for s in shares]
                colour = {"dycoke": "black", "dycoke+": "crimson"}.get(method, f"C{place % 10}")
                panel.plot(
                    x,
                    y,
                    lines[place // 10 % 3],
                    color=colour,
                    lw=2.4 if ours else 1.3,
                    label=method,
                    zorder=3 if ours else 2,
                )
                for s, px, py in zip(shares, x, y, strict=True):
                    face = colour if by[s]["reached"] else "white"
                    mark = marks[place % len(marks)]
                    panel.plot([px], [py], mark, color=colour, mfc=face, ms=6, zorder=4)
                low = [100 * by[s][task]["low"] for s in shares]
                high = [100 * by[s][task]["high"] for s in shares]
                panel.fill_between(x, low, high, color=colour, alpha=0.08, lw=0)
            panel.set_xscale("log")
            ticks = sorted({row["target_retention"] for row in rows if row["method"] != "full"})
            panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.set_title(f"{task}, at equal {basis} tokens", fontsize=11)
            panel.set_xlabel(f"retention: share of the visual tokens {basis}")
            panel.set_ylabel("% right")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
