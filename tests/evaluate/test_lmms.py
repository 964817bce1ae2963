"""lmms-eval's `dycoke` model; with stand-ins for lmms-eval where it is not installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import clips
import pytest
import tiny
import torch
from support import inputs_of

from dycoke import DyCoke, UnsupportedError
from dycoke.assistant import Assistant
from dycoke.evaluate import lmms
from dycoke.evaluate.lmms.account import Account, compress
from dycoke.evaluate.lmms.prompts import generation, video_and_question
from dycoke.evaluate.lmms.settings import argument_names, settings_of
from dycoke.methods import METHODS, create
from dycoke.report import Report

ONE = ([[8]], [(5, 7)])
TEXT_ONLY = {"input_ids": torch.tensor([[7, 8, 9]])}


class Log:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.info, self.warning = self.infos.append, self.warnings.append


def account_of(compressor: Any) -> tuple[Account, Log, list[dict[str, float]]]:
    log = Log()
    records: list[Any] = []
    return Account(compressor, log, records.append), log, records


def report(engaged: bool, retention: float = 1.0, final: float = 1.0) -> Report:
    reason = None if engaged else "no video"
    sample: Any = None  # only their number counts
    return Report(engaged, reason, {}, 0, 0, 0, retention, final, (sample,), "DyCoke")


# Settings


def test_settings_go_to_the_method_and_the_rest_to_the_model() -> None:
    given = {"method": "dycoke", "merge_ratio": 0.5, "prune_layer": 2, "pretrained": "x"}
    settings = settings_of(given)
    assert settings.compressor == DyCoke(merge_ratio=0.5, prune_layer=2)
    assert (settings.base, settings.frame_source, settings.rest) == (
        None,
        None,
        {"pretrained": "x"},
    )
    assert given["prune_layer"] == 2  # the caller's own stays as it is
    settings = settings_of({"method": "full", "base": "qwen2_5_vl", "frame_source": "images"})
    assert (settings.compressor, settings.base, settings.frame_source) == (
        None,
        "qwen2_5_vl",
        "images",
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_its_name(name: str) -> None:
    assert settings_of({"method": name}).compressor == create(name)
    assert settings_of({"method": name, "retention": 0.7}).compressor == create(name, retention=0.7)


def test_own_settings_keep_what_the_name_stands_for() -> None:
    once = settings_of({"method": "once", "retention": 0.7, "prune_ratio": 0.2}).compressor
    assert once == DyCoke(token_budget=0.7, prune_ratio=0.2, refresh_threshold=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "method= is missing"),
        ({"method": "x"}, "unknown method 'x'"),
        ({"method": "dycoke", "merge_ratio": 2}, r"merge_ratio must be in \[0, 1\)"),
        ({"method": "dycoke", "frame_source": "images"}, "max_frames_num"),
        ({"method": "dycoke", "frames": 8}, "frames= is now frame_source=.*max_frames_num="),
        ({"method": "fastv", "ratio": 0.5}, "ratio= is now retention=, .* 1 - ratio"),
        ({"method": "fastv", "retention": 25}, r"in \(0, 1\], got 25; did you mean 0.25\?"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(given)


def test_unknown_arguments_are_refused_before_any_weights() -> None:
    settings = settings_of({"method": "full", "merge_ratio": 0.7, "pretrained": "x"})
    with pytest.raises(ValueError, match=r"neither some_base nor method=full has .*'merge_ratio'"):
        settings.check_rest("some_base", {"pretrained"})
    settings.check_rest("some_base", {"pretrained", "merge_ratio"})


def test_names_of_arguments_above_a_class_count() -> None:
    class Above:
        def __init__(self, pretrained: str, *, fps: int = 1, **kwargs: Any) -> None: ...

    class Below(Above):
        def __init__(self, extra: int = 0, **kwargs: Any) -> None: ...

    assert argument_names(Below) == {"pretrained", "fps", "extra"}


# Prompts


def turn(*content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(content)}]


VIDEO = {"type": "video", "url": "a.mp4"}
TEXT = {"type": "text", "text": "what"}


def test_a_video_and_its_question() -> None:
    assert video_and_question(turn(VIDEO, TEXT)) == ("a.mp4", "what")
    assert video_and_question(turn(TEXT, VIDEO | {"start_time": None}, TEXT)) == (
        "a.mp4",
        "whatwhat",
    )


@pytest.mark.parametrize(
    "messages",
    [
        turn(TEXT),
        turn(VIDEO, VIDEO, TEXT),
        turn(VIDEO, {"type": "image", "url": "a.png"}, TEXT),
        turn(VIDEO | {"end_time": 3.0}, TEXT),
        turn(VIDEO | {"url": {"video_start": 1, "path": "a.mp4"}}, TEXT),
        turn(TEXT, role="system") + turn(VIDEO, TEXT),
    ],
)
def test_other_prompts_are_refused(messages: Any) -> None:
    with pytest.raises(UnsupportedError, match="base="):
        video_and_question(messages)


def test_generation_settings() -> None:
    greedy = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n"]}
    assert generation(greedy) == {"max_new_tokens": 1024}
    assert generation({"max_new_tokens": 16, "num_beams": 3}) == {
        "max_new_tokens": 16,
        "num_beams": 3,
    }
    warm = generation({"temperature": 0.7, "top_p": 0.9, "top_k": None})
    assert warm == {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


# What is counted and refused


def test_sums_are_means_over_what_was_compressed() -> None:
    account, log, records = account_of(DyCoke())
    for values in ((True, 0.5, 0.2), (False,), (True, 0.25, 0.1), (False,)):
        account.add(report(*values))
    assert log.warnings == ["dycoke did not engage: no video"]
    account.fail(MemoryError("cuda"))
    account.close(missing=1)
    assert records == [
        {
            "generations": 4,
            "engaged": 2,
            "failed": 1,
            "retention": pytest.approx(0.375),
            "final_retention": pytest.approx(0.15),
        }
    ]
    assert "compressed 2 of 4" in log.infos[0] and "37.50%" in log.infos[0]
    assert log.warnings[-1].startswith("1 answers are not of the compressed model")


def test_scores_of_the_full_model_are_refused() -> None:
    account, _, _ = account_of(DyCoke())
    account.close()  # nothing was generated, say all answers were cached
    account.add(report(False))
    with pytest.raises(UnsupportedError, match=r"none of 1 generations.*no video"):
        account.close()
    idle, _, _ = account_of(DyCoke(0, 0))
    idle.add(report(False))
    idle.close()  # asked for


class StandIn:
    """A model of lmms-eval: requests are inputs of `generate`, failures are empty answers."""

    def __init__(self, model: Any, swallows: bool = False) -> None:
        self._model, self.swallows = model, swallows

    def generate_until(self, requests: Any) -> list[Any]:
        answers: list[Any] = []
        for request in requests:
            try:
                ids = self._model.generate(**request, max_new_tokens=6, do_sample=False)
                answers.append(ids.tolist())
            except Exception:
                if not self.swallows:
                    raise
                answers.append("")
        return answers

    generate_until_multi_round = loglikelihood = generate_until


@pytest.fixture
def model() -> Any:
    return tiny.FAMILIES["llava_onevision"].model("sdpa", seed=0, layers=5)


@pytest.fixture
def requests() -> list[dict[str, Any]]:
    return [inputs_of("llava_onevision", *ONE, seed) for seed in range(3)]


def test_a_base_answers_as_under_the_compressor(model: Any, requests: Any) -> None:
    full = StandIn(model).generate_until(requests)
    with DyCoke()(model) as run:
        expected = StandIn(model).generate_until(requests)
    reports = run.reports
    assert expected != full
    lm = StandIn(model)
    account, _, records = account_of(DyCoke())
    compress(lm, account)
    assert lm.generate_until(requests) == expected
    assert lm.generate_until_multi_round(requests[:1]) == expected[:1]
    assert [r["generations"] for r in records] == [3, 4]
    assert records[0]["engaged"] == 3
    mean = sum(r.final_retention for r in reports) / 3
    assert records[0]["final_retention"] == pytest.approx(mean)
    with pytest.raises(UnsupportedError, match="likelihoods"):
        lm.loglikelihood(requests)


def test_more_generations_than_reports_are_kept(model: Any, requests: Any) -> None:
    account, _, _ = account_of(DyCoke())
    lm = StandIn(model)
    compress(lm, account)
    lm.generate_until([*requests[:1] * 101, TEXT_ONLY])
    assert (account.engaged, account.generations) == (101, 102)


def test_a_refusal_that_the_base_swallows_is_raised_at_the_end(model: Any, requests: Any) -> None:
    account, log, _ = account_of(DyCoke())
    lm = StandIn(model, swallows=True)
    compress(lm, account)
    refused = requests[0] | {"cache_implementation": "static"}
    with pytest.raises(UnsupportedError, match="StaticCache"):
        lm.generate_until([requests[1], refused])
    assert (account.engaged, account.failed) == (1, 1)
    assert log.warnings[-1].startswith("1 answers are not of the compressed model")


def test_answers_of_another_copy_are_told(model: Any, requests: Any) -> None:
    account, log, _ = account_of(DyCoke())
    lm, other = StandIn(model), StandIn(tiny.FAMILIES["llava_onevision"].model("sdpa", 0, 5))

    def half_elsewhere(requests: Any) -> list[Any]:
        return [
            *StandIn.generate_until(lm, requests[:1]),
            *other.generate_until(requests[1:]),
        ]

    lm.generate_until = half_elsewhere  # type: ignore[method-assign]
    compress(lm, account)
    lm.generate_until(requests)
    assert log.warnings[-1].startswith("2 answers are not of the compressed model")


def test_prompts_without_a_video_are_told_and_refused(model: Any) -> None:
    account, log, _ = account_of(DyCoke())
    lm = StandIn(model)
    compress(lm, account)
    with pytest.raises(UnsupportedError, match="none of 2 generations"):
        lm.generate_until([TEXT_ONLY] * 2)
    assert log.warnings == ["dycoke did not engage: no video in the prompt"]


def test_a_base_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="SimpleNamespace runs no transformers model"):
        compress(SimpleNamespace(model="gpt"), account_of(DyCoke())[0])


# The classes that lmms-eval loads


def stand_ins() -> dict[str, ModuleType]:
    """As much of lmms-eval and what it brings as `dycoke.evaluate.lmms.model` imports."""

    @dataclass
    class TokenCounts:
        output_tokens: int

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts

    class Lmms:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.task_dict: dict[str, Any] = {}

        @property
        def rank(self) -> int:
            return self._rank

    def value(text: str) -> Any:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text

    def parse(text: str) -> dict[str, Any]:
        pairs = [part.split("=", 1) for part in text.split(",") if part]
        return {name: value(text) for name, text in pairs}

    one = SimpleNamespace(local_process_index=0, num_processes=1)
    contents: dict[str, dict[str, Any]] = {
        "accelerate": {"Accelerator": lambda: one},
        "loguru": {"logger": Log()},
        "tqdm": {"tqdm": lambda items, **kwargs: items},
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {"get_model": None},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": None},
        "lmms_eval.utils": {"simple_parse_args_string": parse},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules


@pytest.fixture
def classes(monkeypatch: Any) -> Any:
    """`dycoke.evaluate.lmms.model`, over the real lmms-eval where there is one."""
    try:
        importlib.import_module("lmms_eval.models")
    except ImportError:
        for name, module in stand_ins().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dycoke.evaluate.lmms.model", raising=False)
    loaded = importlib.import_module("dycoke.evaluate.lmms.model")
    yield loaded
    sys.modules.pop("dycoke.evaluate.lmms.model", None)


def request_of(video: Path, question: str) -> Any:
    messages = turn({"type": "video", "url": str(video)}, {"type": "text", "text": question})
    settings = {"max_new_tokens": 5, "temperature": 0}
    return SimpleNamespace(args=("", lambda doc: messages, settings, 0, "task", "test"))


def test_our_own_model_answers_as_the_assistant(
    classes: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(classes, "log_metrics", lambda *args: recorded.append(args))
    clip = clips.render(tmp_path / "clip.mp4", 12)
    questions = ("What stays still?", "How many events are there?")
    assistant = Assistant.load(device="cpu")
    for method, compressor in (("full", None), ("dycoke,merge_ratio=0.5", DyCoke(0.5))):
        lm = classes.Dycoke.create_from_arg_string(
            f"pretrained=nano,max_frames_num=9,method={method}", {"batch_size": 1, "device": "cpu"}
        )
        assert not lm.is_simple
        lm.task_dict = {"task": {"test": [None]}}
        results = lm.generate_until([request_of(clip, question) for question in questions])
        answers = [assistant.ask(clip, q, compressor, 9, max_new_tokens=5) for q in questions]
        assert [result.text for result in results] == [answer.text for answer in answers]
        counts = [result.token_counts.output_tokens for result in results]
        assert counts == [len(answer.tokens) for answer in answers]
    assert len(recorded) == 3  # two speeds and one account
    sums = recorded[-1][-1]
    assert (sums["dycoke_generations"], sums["dycoke_engaged"]) == (2, 2)
    assert sums["dycoke_retention"] == pytest.approx(answers[0].report["retention"])
    for refused in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(UnsupportedError):
            refused([])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("method=full", "pretrained= is missing"),
        ("method=dycoke,pretrained=nano,fps=2.0", "'fps'.*max_frames_num"),
        ("method=full,pretrained=nano,batch_size=4", "batch_size must be 1"),
        ("pretrained=nano", "method= is missing"),
    ],
)
def test_arguments_of_our_own_model(classes: Any, args: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes.Dycoke.create_from_arg_string(args, {"device": None})


def test_a_base_is_built_by_name_and_compressed(
    classes: Any, monkeypatch: Any, model: Any, requests: Any
) -> None:
    class Base(StandIn):
        def __init__(self, pretrained: str, batch_size: int = 2, **kwargs: Any) -> None:
            assert not kwargs
            super().__init__({"tiny": model, "gpt": object()}[pretrained])
            self.batch_size = batch_size

    asked: list[Any] = []

    def get_model(name: str, simple: bool) -> type[Base]:
        asked.append((name, simple))
        return Base

    monkeypatch.setattr(classes, "get_model", get_model)
    monkeypatch.setattr(classes, "log_metrics", lambda *args: None)
    full = classes.Dycoke.create_from_arg_string(
        "base=b,pretrained=tiny,method=full", {"batch_size": 1}
    )
    assert type(full) is Base and full.batch_size == 1
    answers = full.generate_until(requests)
    lm = classes.DycokeSimple.create_from_arg_string("base=b,pretrained=tiny,method=dycoke")
    assert asked == [("b", False), ("b", True)]
    assert type(lm) is Base and lm.generate_until(requests) != answers
    with pytest.raises(ValueError, match="neither b nor method=full"):
        classes.Dycoke.create_from_arg_string("base=b,pretrained=tiny,method=full,fps=2.0")
    with pytest.raises(UnsupportedError, match="base=b: Base runs no transformers model"):
        classes.Dycoke.create_from_arg_string("base=b,pretrained=gpt,method=dycoke")


def test_the_entry_point_names_what_is_there() -> None:
    file = Path(__file__).parents[2] / "pyproject.toml"
    points = tomllib.loads(file.read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"dycoke": f"{lmms.__name__}:{lmms.manifest.__name__}"}


def test_lmms_eval_finds_the_model() -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    registry.register_manifest(lmms.manifest())
    assert registry.get_model_class("dycoke").__name__ == "Dycoke"
    assert registry.get_model_class("dycoke", force_simple=True).__name__ == "DycokeSimple"
