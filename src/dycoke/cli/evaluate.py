"""``dycoke eval``: accuracy on StoryQA, of the standard settings or over retentions (`arena`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dycoke.cli import options
from dycoke.cli.console import BadInput, out, progress_bars
from dycoke.cli.session import load_assistant

if TYPE_CHECKING:
    from dycoke.assistant import Assistant
    from dycoke.evaluate.storyqa import Scores, Setting

TRACED = 50  # stories whose attention is traced: one after another, so not all of them
MERGE_RATIOS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Stories:
    """What an evaluation is of.

    Attributes
    ----------
    split, seed, count : which stories: "seen" or "unseen", the first one's seed, how many.
    model : directory of a nano model; None for the embedded one.
    dtype : its number format; None for the rule.
    workers : processes.
    json_file : where results go; None for nowhere.
    """

    split: str
    seed: int
    count: int
    model: str | None
    dtype: str | None
    workers: int
    json_file: Path | None

    def __str__(self) -> str:
        return f"StoryQA, {self.count} {self.split} stories from seed {self.seed}"

    def load(self) -> Assistant:
        return load_assistant(self.model, None, self.dtype, own_world=True)

    @property
    def partial(self) -> Path | None:
        """Where unfinished results are kept."""
        file = self.json_file
        return None if file is None else file.with_name(file.name + ".partial")

    def answer(
        self, assistant: Assistant, lines: Sequence[Setting], bars: Any
    ) -> dict[str, Scores]:
        """Scores under every setting."""
        from dycoke.evaluate import storyqa

        task = bars.add_task(f"{len(lines)} settings", total=self.count * len(lines))
        return storyqa.evaluate(
            assistant,
            lines,
            self.split,
            self.seed,
            self.count,
            self.partial,
            self.model or "nano",
            lambda name, done: bars.update(task, advance=done, description=name),
            self.workers,
        )

    def save(self, **content: Any) -> None:
        """Write the results, where they are wanted, and drop the unfinished ones."""
        if self.json_file is None or self.partial is None:
            return
        head = {"stories": self.count, "seed": self.seed, "split": self.split}
        self.json_file.write_text(json.dumps({**head, **content}, indent=1) + "\n")
        self.partial.unlink(missing_ok=True)


def eval_command(
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
    token_budget: options.TokenBudget = None,
    prune_ratio: options.PruneRatio = None,
    prune_layer: options.PruneLayer = None,
    score_layer: options.ScoreLayer = None,
    echo: options.Echo = None,
    echo_exact: options.EchoExact = None,
    skip_ratio: options.SkipRatio = None,
    skip_layer: options.SkipLayer = None,
    retentions: Annotated[
        str | None,
        typer.Option(
            help="Instead: methods at these shares of the visual tokens: 0.5,0.25,0.15,0.1,0.05"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="With --retentions: names from dycoke methods, or two joined by a +, such as "
            "visionzip+dycoke [default: all but always]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="With --retentions: the method that the others are compared with [default: dycoke]"
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --retentions: draw accuracy over retention here.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory of another nano model.")] = None,
    dtype: options.Dtype = None,
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
    options.check_folder(json_file, picture)
    stories = Stories(split, seed, count, model, dtype, workers, json_file)
    given = {
        "merge_ratio": merge_ratio,
        "token_budget": token_budget,
        "prune_ratio": prune_ratio,
        "prune_layer": prune_layer,
        "score_layer": score_layer,
        "echo": echo,
        "echo_exact": echo_exact,
        "skip_ratio": skip_ratio,
        "skip_layer": skip_layer,
    }
    standard = {"settings": settings, **given}
    arena = {"methods": methods, "against": against, "picture": picture}
    _check_one_kind(retentions, standard, arena)
    if retentions is None:
        _standard(stories, settings, options.given_settings(**given))
    else:
        from dycoke.cli.arena import over_retentions

        over_retentions(stories, retentions, methods, against or "dycoke", picture)


def _check_one_kind(
    retentions: str | None, standard: dict[str, Any], arena: dict[str, Any]
) -> None:
    """Refuse options of the standard settings with --retentions, and the other way round."""
    foreign = arena if retentions is None else standard
    given = [options.option_name(name) for name, value in foreign.items() if value is not None]
    if not given:
        return
    if retentions is None:
        raise BadInput(
            f"{', '.join(given)}: only with --retentions, such as 0.5,0.25,0.15,0.1,0.05"
        )
    raise BadInput(
        f"{', '.join(given)}: only for the standard settings; with --retentions say --methods"
    )


def _standard(stories: Stories, settings: str | None, given: dict[str, Any]) -> None:
    """Full, DyCoke and its controls; and whether the full model looks where it should.

    ``given`` are settings of DyCoke: its size, and what holds for all lines.
    """
    from dycoke.evaluate import storyqa
    from dycoke.evaluate.attention import looking
    from dycoke.precision import name_of

    assistant = stories.load()
    size = {name: given.pop(name) for name in storyqa.SIZES if name in given}
    sizes = [size] if size else [{"merge_ratio": ratio} for ratio in MERGE_RATIOS]
    try:
        lines = storyqa.standard_settings(sizes, **given)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None
    if settings is not None:
        wanted = tuple(options.comma_separated(settings))
        known = ", ".join(line.name for line in lines)
        for start in wanted or (settings,):
            if not any(line.name.startswith(start) for line in lines):
                raise BadInput(f"no setting begins with {start!r}; there are {known}")
        lines = [line for line in lines if line.name.startswith(wanted)]
    with progress_bars() as bars:
        scores = stories.answer(assistant, lines, bars)
        task = bars.add_task("where full looks", total=1)
        look = looking(
            assistant,
            stories.split,
            stories.seed,
            min(stories.count, TRACED),
            given.get("prune_layer", 3),
        )
        bars.advance(task)
    results = storyqa.setting_results(lines, scores)
    out.print(_accuracies(results, str(stories)))
    inside = look.inside / max(look.words, 1)
    out.print(
        f"words whose most attended frame lies in the event being told: {inside:.1%} of "
        f"{look.words} (by chance {look.chance:.1%}), full model, {look.stories} stories"
    )
    stories.save(dtype=name_of(assistant.model.dtype), results=results, attention=vars(look))


def _accuracies(results: list[dict[str, Any]], title: str) -> Table:
    """Accuracies with their intervals, and differences to the full model."""
    table = Table(title=f"{title}; % right [95 % interval] (difference to full)")
    for name in ("", "retention", "final retention", "ask", "describe"):
        table.add_column(name, justify="left" if not name else "right")
    for result in results:
        cells = [f"{result['retention']:.3f}", f"{result['final_retention']:.3f}"]
        for task in ("ask", "describe"):
            r = result[task]
            low, high = (f"{100 * r[k]:.1f}" for k in ("low", "high"))
            text = f"{100 * r['correct'] / r['n']:.1f} [{low}, {high}]"
            if (d := r.get("to_full")) is not None:
                text += f"\n({100 * d[0]:+.1f} [{100 * d[1]:+.1f}, {100 * d[2]:+.1f}])"
            cells.append(text)
        table.add_row(result["name"], *cells)
    return table
