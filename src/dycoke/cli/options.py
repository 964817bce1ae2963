"""Options that several commands have, and what their values come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dycoke.cli.console import BadInput

if TYPE_CHECKING:
    from dycoke.compressor import Compressor

Model = Annotated[
    str | None,
    typer.Option(help="Directory or hub id of a checkpoint [default: the embedded nano model]"),
]
FrameCount = Annotated[int, typer.Option("--frames", min=1, help="Frames to sample.")]
Stream = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Stream of the file to read, by its number [default: the one a person would watch]",
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option(
        min=1, help="Most pixels of all sampled frames together; larger ones are scaled down."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cuda:1, mps, cpu [default: the best there is]")
]
Retention = Annotated[
    float | None,
    typer.Option(
        help="Share of the visual tokens that stays, in (0, 1] [default: each method's own]"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Number format: bfloat16, float16 or float32 [default: the one in which the device "
        "computes fastest; the embedded model on a CPU: float32]"
    ),
]
MergeRatio = Annotated[
    float | None,
    typer.Option(
        help="dycoke: share of a non-anchor frame's tokens to merge, [0, 1) [default: 0.7]"
    ),
]
TokenBudget = Annotated[
    str | None,
    typer.Option(
        help="dycoke: visual tokens to keep, instead of a merge ratio: 1000 (tokens) or 0.25 "
        "(share)."
    ),
]
PruneRatio = Annotated[
    float | None,
    typer.Option(
        help="dycoke: share of visual tokens a decode step leaves out, [0, 1) [default: 0.7]"
    ),
]
PruneLayer = Annotated[
    int | None,
    typer.Option(help="dycoke: first decoder layer that leaves them out [default: 3]"),
]
Echo = Annotated[
    float | None,
    typer.Option(
        help="Share of the layers, from the first on, where the frames still see what was merged "
        "away, [0, 1] [default: 0; dycoke+: 0.5]"
    ),
]
EchoExact = Annotated[
    int | None,
    typer.Option(help="The first of these layers that compute it in full [default: 0; dycoke+: 1]"),
]
SkipRatio = Annotated[
    float | None,
    typer.Option(
        help="dycoke: share of a non-anchor frame's tokens that the vision encoder does not "
        "compute, at most --merge-ratio [default: 0]"
    ),
]
SkipLayer = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="dycoke: the encoder's first block without them [default: an eighth of its depth]",
    ),
]
ScoreLayer = Annotated[
    str | None,
    typer.Option(
        help="dycoke: layer that chooses what a decode step attends to: 5 (a layer) or 0.6 (a "
        "share of them) [default: the one below --prune-layer; dycoke+: 0.6]"
    ),
]

# Options that were renamed: the new name, and how to get its value.
RENAMED_OPTIONS = {"--ratio": "--retention, the share of the visual tokens that stays: 1 - ratio"}

MAX_PIXELS = 1 << 28  # as `dycoke.video.MAX_PIXELS`, which takes the decoder's import


def comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def exclusive(**given: object) -> None:
    """Refuse more than one of these options, named as in Python; None is an option not given."""
    names = [option_name(name) for name, value in given.items() if value not in (None, False)]
    if len(names) > 1:
        raise BadInput(f"{' and '.join(names)} exclude each other; drop one")


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given_settings(**options: Any) -> dict[str, Any]:
    """A method's settings by name, those that were given."""
    exclusive(**{name: options.get(name) for name in ("merge_ratio", "token_budget")})
    for name in ("token_budget", "score_layer"):
        if options.get(name) is not None:
            options[name] = _number(name, options[name])
    return {name: value for name, value in options.items() if value is not None}


def method_of(name: str, retention: float | None, settings: dict[str, Any]) -> Compressor | None:
    """A method by its name, at a retention, in these settings; None for the full model."""
    from dycoke.methods import choose

    try:
        return choose({"method": name, "retention": retention, **settings})
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None


def _number(name: str, text: str) -> int | float:
    """A count, or a share: 1 is one, 1.0 is all."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise BadInput(f"{option_name(name)} must be a number, got {text!r}")


def check_folder(*files: Path | None) -> None:
    """Refuse a file whose folder does not exist, before anything takes minutes."""
    for file in files:
        if file is not None and not file.resolve().parent.is_dir():
            raise BadInput(f"cannot write {file}: there is no such folder")
