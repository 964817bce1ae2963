"""The error that is ours alone, and checks of settings.

Every message names the value and the allowed range.
"""

from __future__ import annotations

import numbers


class UnsupportedError(RuntimeError):
    """Raised where DyCoke cannot do what was asked, with the reason and the way out.

    A value outside its allowed range is a ``ValueError`` or ``TypeError`` instead.
    """


def check_number(name: str, value: object, allowed: str) -> float:
    """Return ``value`` as a float, or say that it is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in {allowed}, got {value!r}")
    return float(value)


def check_ratio(name: str, value: object) -> float:
    """Return ``value`` as a float in [0, 1), or say what is wrong with it."""
    ratio = check_number(name, value, "[0, 1)")
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return ratio


def check_retention(name: str, value: object) -> float:
    """Return ``value``, a share of the visual tokens that stays, as a float in (0, 1]."""
    share = check_number(name, value, "(0, 1]")
    if not 0.0 < share <= 1.0:
        hint = f"; did you mean {share / 100:g}?" if 1.0 < share <= 100.0 else ""
        raise ValueError(f"{name} must be in (0, 1], got {share:g}{hint}")
    return share


def check_between(name: str, value: object, low: float, high: float) -> float:
    """Return ``value`` as a float in [low, high], or say what is wrong with it."""
    number = check_number(name, value, f"[{low:g}, {high:g}]")
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
    return number


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Say so where ``value`` is none of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_listener(value: object) -> None:
    """Say so where ``value``, an ``on_step``, cannot be called and is not None."""
    if value is not None and not callable(value):
        raise TypeError(f"on_step must be a function of one Step, or None, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return ``value`` as an int of at least ``least``, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def check_layer(name: str, value: object) -> int | float:
    """Return ``value`` as an int of at least 0 or a float in [0, 1), or say what is wrong."""
    allowed = f"{name} must be an integer of at least 0 (a layer) or a float in [0, 1) (a share)"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{allowed}, got {value!r}")
    layer = int(value) if isinstance(value, numbers.Integral) else float(value)
    if layer < 0 or (isinstance(layer, float) and layer >= 1):
        raise ValueError(f"{allowed}, got {value!r}")
    return layer


def check_budget(name: str, value: object) -> int | float:
    """Return ``value`` as an int of at least 1 or a float in (0, 1], or say what is wrong."""
    allowed = f"{name} must be an integer of at least 1 (tokens) or a float in (0, 1] (a share)"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{allowed}, got {value!r}")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(f"{allowed}, got {value!r}")
        return int(value)
    share = float(value)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{allowed}, got {value!r}")
    return share
