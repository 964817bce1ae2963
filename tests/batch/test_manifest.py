"""What inputs come to, and what is said of bad ones."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dycoke.batch.items import BatchError, Item, digest
from dycoke.batch.manifest import read_inputs
from dycoke.batch.shards import Slice, cut


def inputs(*sources: Path | str, prompts: tuple[str, ...] = ("?",), frames: int = 8) -> list[Item]:
    return read_inputs([str(source) for source in sources], prompts, frames)


def asked(items: list[Item]) -> list[tuple[str, str, str, int]]:
    return [
        (os.path.basename(item.video), question.id, question.prompt, item.frames)
        for item in items
        for question in item.questions
    ]


def write(path: Path, *lines: Any) -> Path:
    said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in said))
    return path


def tar(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w") as made:
        for name, content in files.items():
            source = path.with_name("member")
            source.write_bytes(content)
            made.add(source, name.replace("__", "."))
            source.unlink()
    return path


def test_folders_globs_and_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "notes.md", "odd.bin"):
        (tmp_path / name).write_bytes(b"")
    assert [name for name, *_ in asked(inputs(tmp_path))] == ["a.MKV", "b.mp4", "c.webm"]
    assert [name for name, *_ in asked(inputs(f"{tmp_path}/**/*.[mw]*[4m]"))] == ["b.mp4", "c.webm"]
    assert [name for name, *_ in asked(inputs(tmp_path / "odd.bin"))] == ["odd.bin"]
    (one,) = inputs(tmp_path / "b.mp4", prompts=("What?", "Who?"))
    assert one.video == str(tmp_path / "b.mp4") and one.questions[0].id == one.video
    assert [question.prompt for question in one.questions] == ["What?", "Who?"]


def test_a_manifest_says_the_same_in_every_format(tmp_path: Path) -> None:
    lines = [
        {"video": "x.mp4", "id": "first", "prompt": "Why?", "frames": 4},
        {"video": "sub/y.mp4", "id": "second", "prompt": "", "frames": None},
    ]
    write(tmp_path / "m.jsonl", *lines)
    write(
        tmp_path / "m.csv",
        "frames,video,id,prompt,other",
        "4,x.mp4,first,Why?,z",
        ",sub/y.mp4,second,,",
    )
    expected = [("x.mp4", "first", "Why?", 4), ("y.mp4", "second", "?", 8)]
    for name in ("m.jsonl", "m.csv"):
        items = inputs(tmp_path / name)
        assert asked(items) == expected
        assert items[1].video == str(tmp_path / "sub" / "y.mp4")
    write(tmp_path / "m.txt", "x.mp4", "", "  /elsewhere/y.mp4 ")
    items = inputs(tmp_path / "m.txt")
    assert asked(items) == [("x.mp4", "x.mp4", "?", 8), ("y.mp4", "/elsewhere/y.mp4", "?", 8)]
    assert items[1].video == "/elsewhere/y.mp4"


def test_a_parquet_manifest(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="dycoke[batch] is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"id": [1, 2], "video": ["x.mp4", "y.mp4"], "frames": [None, 3]})
    parquet.write_table(table, tmp_path / "m.parquet")
    assert asked(inputs(tmp_path / "m.parquet")) == [("x.mp4", "1", "?", 8), ("y.mp4", "2", "?", 3)]
    parquet.write_table(pyarrow.table({"path": ["x"]}), tmp_path / "n.parquet")
    with pytest.raises(BatchError, match="no column video among path"):
        inputs(tmp_path / "n.parquet")


def test_questions_on_one_video_share_it_wherever_they_stand(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "m.jsonl",
        {"video": "x.mp4", "id": "a", "prompt": ["1?", "2?"]},
        {"video": "y.mp4"},
        {"video": "./x.mp4", "id": "b", "prompt": "1?"},
        {"video": "x.mp4", "id": "c", "frames": 2},
    )
    items = inputs(manifest)
    assert asked(items) == [
        ("x.mp4", "a", "1?", 8),
        ("x.mp4", "a", "2?", 8),
        ("x.mp4", "b", "1?", 8),
        ("y.mp4", "y.mp4", "?", 8),
        ("x.mp4", "c", "?", 2),
    ]
    assert len(items) == 3  # another number of frames is another prefill


def test_tars_in_webdatasets_layout(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "shard-0.tar",
        a__mp4=b"first video",
        a__json=b'{"id": "one", "prompt": "Who?", "frames": 3}',
        a__txt=b"a caption, which is no prompt",
        b__x__mp4=b"second",
    )
    items = inputs(path)
    assert asked(items) == [("a.mp4", "one", "Who?", 3), ("b.x.mp4", f"{path}/b.x.mp4", "?", 8)]
    whole = path.read_bytes()
    got = [whole[i.member.offset : i.member.offset + i.member.size] for i in items]
    assert got == [b"first video", b"second"]
    assert items == inputs(tmp_path)  # a folder of shards
    assert Item.from_dict(json.loads(json.dumps(items[0].to_dict()))) == items[0]


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("m.jsonl", ["{"], "line 1: no JSON"),
        ("m.jsonl", [{"video": "x"}, [1]], r"line 2: .*got \[1\]"),
        ("m.jsonl", [{"id": "x"}], "video must be a path, got None"),
        ("m.jsonl", [{"video": "x", "frames": 0}], "at least 1, got 0"),
        ("m.jsonl", [{"video": "x", "frames": 2.5}], "at least 1, got 2.5"),
        ("m.jsonl", [{"video": "x", "frames": "many"}], "got 'many'"),
        ("m.jsonl", [{"video": "x", "prompt": 3}], "prompt must be .* got 3"),
        ("m.jsonl", [{"video": "x", "prompt": []}], r"got \[\]"),
        ("m.jsonl", [{"video": "x", "id": [1]}], r"id must be .* got \[1\]"),
        (
            "m.jsonl",
            [{"video": "x"}, {"video": "./x", "id": "x"}],
            "prompt '[?]' twice.*line 1.*line 2",
        ),
        ("m.jsonl", [{"video": "x", "id": "a"}, {"video": "y", "id": "a"}], "'a' names two videos"),
        ("m.csv", ["path", "x"], "no column video among path"),
        ("m.csv", [], "no column video"),
        ("m.txt", [""], "no videos there"),
        ("m.tar", ["no tar"], "cannot be read as a tar"),
    ],
)
def test_bad_manifests_are_one_line(tmp_path: Path, name: str, lines: list[Any], said: str) -> None:
    with pytest.raises(BatchError, match=said) as raised:
        inputs(write(tmp_path / name, *lines))
    assert "\n" not in str(raised.value)


def test_bad_sources(tmp_path: Path) -> None:
    for source, said in [("gone", "no such file"), ("*.mp4", "no videos"), ("", "no videos")]:
        with pytest.raises(BatchError, match=said):
            inputs(tmp_path / source)
    with pytest.raises(BatchError, match="no videos in nothing"):
        inputs()
    (tmp_path / "m.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BatchError, match="cannot be read as text"):
        inputs(tmp_path / "m.txt")
    with pytest.raises(BatchError, match="two videos"):
        inputs(tar(tmp_path / "x.tar", a__mp4=b"1", a__webm=b"2"))
    with pytest.raises(BatchError, match=r"a\.json.*no JSON"):
        inputs(tar(tmp_path / "x.tar", a__mp4=b"1", a__json=b"{"))
    with pytest.raises(BatchError, match="no videos in this tar"):
        inputs(tar(tmp_path / "x.tar", a__txt=b"1"))


def test_slices_are_all_shards_and_none_twice() -> None:
    shards = range(23)
    parts = [[s for s in shards if s in Slice.parse(f"{i}/5")] for i in range(5)]
    assert sorted(s for part in parts for s in part) == list(shards)
    for text in ("5/5", "-1/5", "1", "1/0", "a/b"):
        with pytest.raises(BatchError, match="from 0 to n - 1"):
            Slice.parse(text)


def test_shards_and_digests(tmp_path: Path) -> None:
    items = inputs(write(tmp_path / "m.txt", *"abcdefg"))
    assert [len(shard) for shard in cut(items, 3)] == [3, 3, 1]
    assert [item for shard in cut(items, 3) for item in shard] == items
    other = inputs(tmp_path / "m.txt", prompts=("!",))
    assert len({digest(items), digest(other), digest(items[::-1]), digest(items[:-1])}) == 4
    assert digest(items) == digest(inputs(tmp_path / "m.txt"))
