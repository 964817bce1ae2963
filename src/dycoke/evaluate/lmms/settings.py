"""What ``--model_args`` come to: a method, the model under it, and that model's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dycoke.compressor import Compressor
from dycoke.methods import create

# Settings that were renamed: the new name, and what to know of it.
RENAMED_SETTINGS = {
    "ratio": "retention=, the share of the visual tokens that stays: 1 - ratio",
    "frames": "frame_source=, which says what a base= hands over; the number of frames is "
    "max_frames_num=",
}


@dataclass(frozen=True)
class Settings:
    """The arguments, taken apart.

    Attributes
    ----------
    method : its name.
    compressor : None for the full model.
    base : name of an lmms-eval model to compress; None for our own.
    frame_source : "images" where the base hands over frames as images, see `Compressor.__call__`.
    rest : arguments of the model.
    """

    method: str
    compressor: Compressor | None
    base: str | None
    frame_source: str | None
    rest: dict[str, Any]

    def check_rest(self, model: str, known: Collection[str]) -> None:
        """Refuse arguments that the model does not know, before it loads any weights."""
        unknown = sorted(set(self.rest) - set(known))
        if unknown:
            raise ValueError(
                f"neither {model} nor method={self.method} has a setting "
                f"{', '.join(map(repr, unknown))}; {model} has {_list(known)}; "
                f"method={self.method} has {_list(_names(self.compressor)) or 'none'}"
            )


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Take ``--model_args`` apart.

    Parameters
    ----------
    arguments : ``method`` (a name in `dycoke.methods`), ``retention`` (the share of the
        visual tokens that it keeps, in (0, 1]) and its own settings by name; ``base`` and
        ``frame_source``; the rest is the model's.

    Raises
    ------
    ValueError, TypeError
        For no method or an unknown one, for values out of range, and for names of old.
    """
    rest = dict(arguments)
    for old, new in RENAMED_SETTINGS.items():
        if old in rest:
            raise ValueError(f"{old}= is now {new}")
    name, retention = rest.pop("method", None), rest.pop("retention", None)
    base, frame_source = rest.pop("base", None), rest.pop("frame_source", None)
    if name is None:
        raise ValueError(
            "method= is missing: say method=dycoke, or method=full for the model as is"
        )
    compressor = create(str(name), retention=retention)
    own = {key: rest.pop(key) for key in list(rest) if key in _names(compressor)}
    if compressor is not None and own:
        compressor = type(compressor).from_dict(compressor.to_dict() | own)
    if frame_source is not None and base is None:
        raise ValueError(
            f"frame_source={frame_source!r} says what a base= hands over, and there is "
            "none; the number of frames is max_frames_num="
        )
    return Settings(str(name), compressor, base, frame_source, rest)


def argument_names(cls: type) -> set[str]:
    """Names that a class and those above it take; ``**kwargs`` often only pass on to these."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: set[str] = set()
    for parent in cls.__mro__:
        if (init := vars(parent).get("__init__")) is not None and parent is not object:
            known = inspect.signature(init).parameters.values()
            names |= {parameter.name for parameter in known if parameter.kind in named}
    return names - {"self"}


def _names(compressor: Compressor | None) -> set[str]:
    """A method's own settings; how much it keeps is ``retention`` for all."""
    return set() if compressor is None else compressor.setting_names() - {"ratio"}


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
