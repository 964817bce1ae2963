"""The whole way on the embedded model: clips, batches, tars, several questions, failures."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dycoke import DyCoke, cli
from dycoke.assistant import Assistant
from dycoke.batch.answering import ModelAnswerer, ModelSpec
from dycoke.batch.items import Item, Question
from dycoke.batch.manifest import read_inputs
from dycoke.batch.shards import Folder
from dycoke.batch.worker import Plan, Worker
from dycoke.nano import stories

FRAMES = 24
DESCRIBE = stories.DESCRIBE[0]
COUNT = "How many events are there?"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: Any) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    return [
        stories.write(stories.make("seen", seed), folder / f"s{seed}.mp4") for seed in (310, 311)
    ]


@pytest.fixture(scope="module")
def model() -> ModelAnswerer:
    return ModelSpec(device="cpu", compressor=DyCoke(), method="dycoke").build()


def rows_of(model: ModelAnswerer, path: Path, items: Sequence[Item], size: int = 1) -> Any:
    folder = Folder(path)
    folder.begin({})
    Worker(model, folder, Plan(batch_size=size)).run(0, items)
    return list(folder.rows(0))


def test_batches_and_shared_prefills_answer_as_ask_does(
    model: ModelAnswerer, clips: list[Path], tmp_path: Path
) -> None:
    asked = [(str(clip), prompt) for clip in clips for prompt in (DESCRIBE, COUNT)]
    each = {
        (clip, prompt): model.assistant.ask(clip, prompt, DyCoke(), frames=FRAMES)
        for clip, prompt in asked
    }
    single = [Item(clip, FRAMES, (Question(clip, prompt),)) for clip, prompt in asked]
    batched = rows_of(model, tmp_path / "batch", single, size=4)
    shared = rows_of(
        model,
        tmp_path / "shared",
        [
            Item(str(clip), FRAMES, tuple(Question(str(clip), p) for p in (DESCRIBE, COUNT)))
            for clip in clips
        ],
    )
    for rows in (batched, shared):
        assert [(row["id"], row["prompt"]) for row in rows] == asked
        for row in rows:
            alone = each[row["id"], row["prompt"]]
            sample = alone.report.samples[0]
            assert row["text"] == alone.text and row["finish_reason"] == "stop"
            assert row["tokens"] == {
                "visual": sample.visual_tokens,
                "kept": sample.kept_tokens,
                "active": sample.active_tokens,
                "prompt": row["tokens"]["prompt"],
                "new": len(alone.tokens),
            }
            assert row["tokens"]["prompt"] > sample.visual_tokens == FRAMES * 36
            seconds = row["seconds"]
            parts = seconds["decode"] + seconds["encode"] + seconds["prefill"]
            assert 0 < parts < seconds["total"]
            assert (row["frames"], row["duration_s"]) == (FRAMES, 3.0)
            assert row["settings"] == DyCoke().to_dict() and row["model"] == "nano"


def test_the_full_model_keeps_and_attends_to_all(
    model: ModelAnswerer, clips: list[Path], tmp_path: Path
) -> None:
    full = ModelAnswerer(model.assistant, ModelSpec(device="cpu"))
    path = str(clips[0])
    one = rows_of(full, tmp_path / "one", [Item(path, FRAMES, (Question("a", COUNT),))])
    two = rows_of(
        full,
        tmp_path / "two",
        [Item(path, FRAMES, (Question("a", COUNT), Question("a", DESCRIBE)))],
    )
    assert one[0]["text"] == two[0]["text"] == full.assistant.ask(path, COUNT, frames=FRAMES).text
    for row in (*one, *two):
        tokens = row["tokens"]
        assert tokens["visual"] == tokens["kept"] == tokens["active"] == FRAMES * 36
        assert row["method"] == "full" and row["settings"] == {}


def test_a_member_of_a_tar_is_its_file(
    model: ModelAnswerer, clips: list[Path], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for clip in clips:
            tar.add(clip, clip.name)
    scratch = tmp_path / "scratch"
    for clip, item in zip(
        clips, read_inputs([str(tmp_path / "shard.tar")], [COUNT], FRAMES), strict=True
    ):
        file = model.load(Item(str(clip), FRAMES, item.questions), str(scratch))
        member = model.load(item, str(scratch))
        assert (member.content.video.frames == file.content.video.frames).all()
        assert member.key == file.key
    assert not list(scratch.iterdir())


def test_the_command(clips: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dycoke", "batch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code), said.out, said.err

    (clips[0].parent / "empty.mp4").touch()
    manifest = tmp_path / "m.jsonl"
    lines = [
        {"video": str(clips[0]), "id": "first"},
        {"video": str(clips[0].parent / "empty.mp4"), "id": "empty"},
        {"video": "gone.mp4"},
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    target = tmp_path / "rows.jsonl"
    options = ("-p", COUNT, "--frames", FRAMES, "--device", "cpu", "--out", target)
    code, out, err = call(manifest, *options, "--fail-over", "50%")
    assert code == 1 and "66.7% of the rows failed, more than --fail-over 50%" in err
    assert "3 rows" in out and "2 VideoError" in out
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["first", "empty", "gone.mp4"]
    assert (
        rows[0]["text"]
        == Assistant.load(device="cpu").ask(clips[0], COUNT, DyCoke(), frames=FRAMES).text
    )
    assert "not a readable video" in rows[1]["error"]["message"]
    assert "no such file" in rows[2]["error"]["message"]
    assert list(rows[0]) == list(rows[2])

    target.unlink()
    code, out, err = call("--join", "--out", target, "--fail-over", "5%")
    assert code == 1 and "66.7% of the rows failed" in err and "2 VideoError" in out
    assert call("--join", "--out", target, "--fail-over", "70%")[0] == 0
    assert [json.loads(line) for line in target.read_text().splitlines()] == rows
    assert call(manifest, *options)[0] == 0  # nothing is left to do, and nothing is said of a share
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    for bad, said in [
        ((manifest, *options, "--method", "full"), "begun in other settings (method was 'dycoke'"),
        ((manifest, *options, "--shard", "2/2"), "--shard must be i/n"),
        ((manifest, *options, "--runner", "spark"), "--runner must be local or ray, got 'spark'"),
        ((manifest, *options, "--fail-over", "500%"), "--fail-over must be a share"),
        (("nowhere", *options), "nowhere: there is no such file or folder"),
        ((*options,), "no videos in nothing"),
        (("--join", "--out", tmp_path / "none"), "no run was begun here"),
        ((manifest, "--out", tmp_path / "a" / "b"), "there is no such folder"),
        ((manifest, "--out", tmp_path / "x.csv"), "joined to a .jsonl or .parquet file"),
        ((manifest, "--out", tmp_path / "x.parquet"), "parquet needs pyarrow"),
    ]:
        code, out, err = call(*bad)
        assert (code, out) == (2, "") and said in " ".join(err.split())
