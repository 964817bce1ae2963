"""The number format follows what the processor says of itself. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dycoke import nano, precision
from dycoke.assistant import Assistant
from dycoke.precision import choose_format

asked_of_processor = precision.instructions  # before `plain_processor` answers for it


@pytest.fixture
def says(monkeypatch: Any) -> Callable[..., None]:
    """Make the processor say that it has these instructions; None: nothing tells."""

    def say(*names: str | None) -> None:
        told = None if names == (None,) else frozenset(names)
        monkeypatch.setattr(precision, "instructions", lambda: told)

    return say


@pytest.fixture
def no_trial(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: pytest.fail("measured"))


@pytest.mark.usefixtures("no_trial")
@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", "svebf16", "sve_bf16"])
def test_bfloat16_where_there_are_instructions(says: Any, unit: str) -> None:
    says("avx2", unit)
    assert choose_format("cpu").dtype == torch.bfloat16
    assert unit in str(choose_format("cpu"))


@pytest.mark.usefixtures("no_trial")
def test_float32_where_there_are_none(says: Any) -> None:
    says("avx2", "avx512_f", "fma")
    assert str(choose_format("cpu")) == "float32 (the processor has no bfloat16)"


@pytest.mark.parametrize("bfloat16_s", [1.0, 3.0])
def test_one_trial_where_nothing_tells(says: Any, monkeypatch: Any, bfloat16_s: float) -> None:
    says(None)
    takes = {torch.bfloat16: bfloat16_s, torch.float32: 2.0}
    calls = []

    def product_s(dtype: torch.dtype) -> float:
        calls.append(dtype)
        return takes[dtype]

    monkeypatch.setattr(precision, "_product_s", product_s)
    precision.bfloat16_is_faster.cache_clear()
    try:
        chosen = {choose_format("cpu") for _ in range(3)}
    finally:
        precision.bfloat16_is_faster.cache_clear()
    dtype = torch.bfloat16 if bfloat16_s < 2 else torch.float32
    assert [choice.dtype for choice in chosen] == [dtype]
    assert sorted(map(str, calls)) == ["torch.bfloat16", "torch.float32"]


def test_the_trial_multiplies_in_the_format_that_it_is_about(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "PRODUCT", (2, 3, 4))
    seen = []
    product = torch.Tensor.__matmul__

    def spy(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append((one.dtype, other.dtype, one.shape, other.shape))
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    assert precision._product_s(torch.bfloat16) > 0
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, (2, 3), (3, 4))}


def test_what_is_asked_for_is_taken(says: Any) -> None:
    says("avx512_bf16")
    for embedded in (False, True):
        assert choose_format("cpu", "float32", embedded).dtype == torch.float32
        assert choose_format("cpu", torch.float16, embedded).dtype == torch.float16
        assert choose_format("mps", "bfloat16", embedded).dtype == torch.bfloat16
    for name in ("float99", "int8", "nn", "float"):
        with pytest.raises(ValueError, match=rf"'{name}'; try bfloat16, float16, float32"):
            choose_format("cpu", name)


def test_gpus_say_themselves(says: Any, monkeypatch: Any) -> None:
    says()
    assert choose_format("mps").dtype == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert choose_format("cuda:1").dtype == dtype


def test_the_embedded_model_stays_float32(says: Any) -> None:
    says("avx512_bf16")
    assert choose_format("cpu", embedded=True).dtype == torch.float32
    for source in (None, nano.path(), str(nano.path())):
        assert Assistant.load(source, "cpu").model.dtype == torch.float32
    assert Assistant.load(None, "cpu", "bfloat16").model.dtype == torch.bfloat16


def test_other_models_follow_the_processor(says: Any, tmp_path: Path) -> None:
    from dycoke.nano.build import build

    folder = build(tmp_path / "other")
    says("avx512_bf16")
    assert Assistant.load(folder, "cpu").model.dtype == torch.bfloat16
    says()
    assert Assistant.load(folder, "cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("line", "has", "lacks"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16", "amx_bf16", "bf16"),
        ("Features\t: fp asimd bf16 sve", "bf16", "avx2"),
    ],
)
def test_linux_tells_where_torch_does_not(
    monkeypatch: Any, tmp_path: Path, line: str, has: str, lacks: str
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nbugs\t\t: bf16_is_no_bug\n{line}\n")
    monkeypatch.setattr(precision, "CPUINFO", info)
    told = asked_of_processor()
    assert told is not None and has in told and lacks not in told
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "none")
    assert asked_of_processor() is None


def test_torch_is_asked_first(monkeypatch: Any, tmp_path: Path) -> None:
    told = {"architecture": "x", "bf16": True, "neon": True, "sve": False, "sve_max_length": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "none")
    assert asked_of_processor() == {"bf16", "neon"}
    told.clear()  # a kind of processor that it does not know
    assert asked_of_processor() is None
