"""Model families: where the video tokens stand in a prompt.

A family is a file of this folder, 15 to 60 lines, that is found by itself. It has one function,
``layout(prompt)``, which returns where the tokens of each video are, and ends in ``FAMILY =
Family(...)``, which states in this order of importance

- the family's name, the ``config.model_type`` values that it serves, and checkpoints for people,
- whether its rotary positions are 1-D or 3-D,
- whether the frames of a video come as videos, as images, or as either,
- where the vision encoder keeps its attention, for methods that look at it, and in which order the
  encoder takes the tokens, if not in the prompt's,
- and what differs from other families: masks that are more than causal and windowed, another name
  of the video's placeholder, options without which the processor makes prompts that cannot be
  compressed, and notes on what does not apply.

`Family` in `base.py` documents and checks each field; `locate.py` asks the family about a prompt.
``examples/new_family.py`` adds one.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from dycoke.errors import UnsupportedError
from dycoke.models.base import Family, Layout, Masks, Prompt, VideoSpan

_NO_FAMILIES = ("base", "locate")


@cache
def families() -> dict[str, Family]:
    """All known families, by the ``config.model_type`` values that they serve."""
    table: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name not in _NO_FAMILIES:
            family: Family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
            for model_type in family.model_types:
                if model_type in table:
                    raise ValueError(
                        f"{family.name} and {table[model_type].name} both serve {model_type!r}"
                    )
                table[model_type] = family
    return table


def family_of(config: Any) -> Family:
    """The family that serves this config, or an error that lists the known ones."""
    model_type = getattr(config, "model_type", None)
    family = families().get(str(model_type))
    if family is None:
        raise UnsupportedError(
            f"the model family {model_type!r} is not known; known: "
            f"{', '.join(sorted(families()))}; for another one pass layout=, a function that "
            "takes a dycoke.models.Prompt and returns a VideoSpan per video"
        )
    return family


def limits(family: Family) -> list[str]:
    """What of DyCoke does not apply to a family, or only on request, and why."""
    if "images" not in family.frame_sources:
        found = ["images are never merged"]
    elif "videos" in family.frame_sources:
        found = ['images are merged only with frame_source="images"']
    else:
        found = ['frames are images, merged only with frame_source="images"']
    if family.rope == "3-D":
        found.append('no positions="compact", which numbers 1-D positions')
    return [*found, *family.notes]


__all__ = ["Family", "Layout", "Masks", "Prompt", "VideoSpan", "families", "family_of", "limits"]
