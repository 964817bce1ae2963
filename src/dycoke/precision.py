"""The number format of a model: the one in which its processor computes fastest.

A processor without instructions for bfloat16 unpacks it for every product, and then takes several
times as long as in float32; one with them takes half as long.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Instructions that multiply bfloat16: as torch names them, and as Linux does.
UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16", "svebf16")
FORMATS = ("bfloat16", "float16", "float32", "float64")
CPUINFO = Path("/proc/cpuinfo")
PRODUCT = (256, 1024, 1024)  # of the trial: long enough to keep any processor busy


@dataclass(frozen=True)
class NumberFormat:
    """A number format, and in a few words why it is this one."""

    dtype: torch.dtype
    why: str

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} ({self.why})"


def name_of(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choose_format(
    device: str, asked: torch.dtype | str | None = None, embedded: bool = False
) -> NumberFormat:
    """The number format for a model.

    Parameters
    ----------
    device : such as "cuda:1" or "cpu".
    asked : what the user asked for, a torch dtype or its name; None for the rule.
    embedded : whether it is the embedded model, whose published accuracy is float32's.

    Returns
    -------
    NumberFormat
        What was asked for. Else bfloat16 on CUDA (float16 on GPUs without it), float16 on MPS; on
        a CPU bfloat16 where it has instructions for it, and float32 where not. A processor that
        tells nothing multiplies once in both.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if isinstance(asked, str):
        if asked not in FORMATS:
            raise ValueError(f"unknown dtype {asked!r}; try {', '.join(FORMATS[:-1])}")
        return NumberFormat(getattr(torch, asked), "as asked")
    if asked is not None:
        return NumberFormat(asked, "as asked")
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported():
            return NumberFormat(torch.bfloat16, "the GPU has it")
        return NumberFormat(torch.float16, "the GPU has no bfloat16")
    if kind == "mps":
        return NumberFormat(torch.float16, "Apple's GPU")
    if embedded:
        return NumberFormat(torch.float32, "the embedded model")
    return _of_processor()


def _of_processor() -> NumberFormat:
    known = instructions()
    if known is None:
        faster = bfloat16_is_faster()
        words = "the faster one in a trial"
        return NumberFormat(torch.bfloat16 if faster else torch.float32, words)
    for unit in UNITS:
        if unit in known:
            return NumberFormat(torch.bfloat16, f"the processor has {unit}")
    return NumberFormat(torch.float32, "the processor has no bfloat16")


def instructions() -> frozenset[str] | None:
    """Names of the sets of instructions that this processor has; None where nothing tells."""
    # Newer torch asks the processor; Linux tells in any case.
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if names := frozenset(name for name, has in told.items() if has is True):
        return names
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, ARM
                return frozenset(value.split())
    return None


@cache
def bfloat16_is_faster() -> bool:
    """Whether a short product takes less time in bfloat16 than in float32, measured once."""
    return _product_s(torch.bfloat16) < _product_s(torch.float32)


def _product_s(dtype: torch.dtype) -> float:
    """The least time of three products, after one that warms up."""
    rows, inner, columns = PRODUCT
    one, other = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        one @ other
        times.append(time.perf_counter() - began)
    return min(times[1:])
