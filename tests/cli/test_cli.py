"""The command as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import clips
import pytest
from rich.console import Console

import dycoke
from dycoke import cli
from dycoke.cli import lists, options
from dycoke.video import MAX_PIXELS

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
CLIPS = sorted(p.name for p in VIDEOS.glob("*.m*") if p.suffix != ".md")
TIMINGS = [
    "decode_s",
    "process_s",
    "video_s",
    "vision_s",
    "compress_s",
    "prefill_s",
    "ttft_s",
    "per_token_s",
    "total_s",
]
REPORT = [
    "engaged",
    "reason",
    "settings",
    "kv_bytes",
    "kv_bytes_full",
    "decode_steps",
    "retention",
    "final_retention",
    "samples",
    "method",
    "below",
    "echo_layers",
    "exact_layers",
    "score_layer",
    "scores_late",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    return clips.render(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: Any) -> Path:
    return checkpoints.qwen2_5_vl(tmp_path_factory.mktemp("checkpoints"))


def test_json_is_one_line_with_the_promised_fields(run: Any, clip: Path) -> None:
    code, out, _ = run("run", clip, "--prompt", "what happens", "--frames", 9,
                       "--max-new-tokens", 5, "--json")  # fmt: skip
    assert code == 0
    assert out.count("\n") == 1 and out.endswith("\n")
    result = json.loads(out)
    assert list(result) == ["text", "report", "timings"]
    assert list(result["timings"]) == TIMINGS
    assert list(result["report"]) == REPORT
    sample = result["report"]["samples"][0]
    assert sample["videos"] == [
        {
            "frames": 9,
            "tokens_per_frame": 36,
            "visual_tokens": 324,
            "kept_tokens": 168,
            "encoded_tokens": 324,
            "source": "videos",
        }
    ]
    assert (sample["kept_tokens"], sample["active_tokens"]) == (3 * 36 + 6 * 10, 50)
    assert result["report"]["engaged"] is True
    assert result["report"]["settings"] == dycoke.DyCoke().to_dict()


def test_compare_gives_both(run: Any, clip: Path) -> None:
    args = ("run", clip, "--frames", 9, "--max-new-tokens", 5, "--compare")
    code, out, _ = run(*args, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert list(result) == ["text", "report", "timings", "full"]
    assert list(result["full"]) == ["text", "report", "timings"]
    assert result["full"]["report"] is None
    assert list(result["full"]["timings"]) == TIMINGS
    code, out, _ = run(*args)
    assert code == 0
    for word in ("full:", "DyCoke:", "ratio", "visual tokens attended", "KV cache", "prefill"):
        assert word in out


def test_no_compress_is_plain(run: Any, clip: Path) -> None:
    args = ("run", clip, "--frames", 5, "--max-new-tokens", 5, "--json")
    plain = json.loads(run(*args, "--no-compress")[1])
    zero = json.loads(run(*args, "--merge-ratio", 0, "--prune-ratio", 0)[1])
    assert plain["report"] is None
    assert plain["text"] == zero["text"]
    assert zero["report"]["engaged"] is False


def test_a_method_by_name(run: Any, clip: Path) -> None:
    args = ("run", clip, "--frames", 9, "--max-new-tokens", 5)
    code, out, _ = run(*args, "--method", "visionzip", "--retention", 0.25, "--json")
    report = json.loads(out)["report"]
    assert code == 0
    assert report["method"] == "VisionZip" and report["settings"]["ratio"] == 0.75
    assert report["retention"] == report["final_retention"] == 0.25
    code, out, _ = run(*args, "--method", "visionzip", "--compare")
    assert code == 0 and "DyCoke" not in out
    for word in ("full:", "visionzip:", "ratio", "visual tokens attended"):
        assert word in out
    full, plain = (json.loads(run(*args, *how, "--json")[1]) for how in
                   (("--method", "full"), ("--no-compress",)))  # fmt: skip
    assert full["report"] is None and full["text"] == plain["text"]


def test_retention_beside_the_papers_pruning(run: Any, clip: Path) -> None:
    args = ("run", clip, "--frames", 9, "--max-new-tokens", 5, "--json")
    _, out, _ = run(*args, "--retention", 0.5, "--prune-ratio", 0.5)
    report = json.loads(out)["report"]
    assert report["settings"] == dycoke.DyCoke(token_budget=0.5, prune_ratio=0.5).to_dict()
    assert (report["retention"], report["final_retention"]) == (0.5, 0.25)


def test_the_limit_of_pixels_is_the_readers_own() -> None:
    assert options.MAX_PIXELS == MAX_PIXELS


def test_another_model_by_directory(run: Any, clip: Path, qwen: Path) -> None:
    code, out, err = run(
        "run", clip, "--model", qwen, "--frames", 8, "--max-new-tokens", 4, "--json"
    )
    assert code == 0
    assert json.loads(out)["report"]["samples"][0]["frames"] == 4
    assert "random weights" not in err


def test_a_package_that_a_processor_lacks(
    run: Any, clip: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    name = "transformers.models.smolvlm.processing_smolvlm.num2words"
    monkeypatch.setattr(name, str)
    folder = checkpoints.smolvlm(tmp_path)
    monkeypatch.setattr(name, None)
    code, out, err = run("run", clip, "--model", folder, "--frames", 3, "--json")
    assert (code, out) == (2, "")
    assert len([line for line in err.splitlines() if line.startswith("dycoke: ")]) == 1
    assert "cannot load the model" in err and "pip install num2words" in err


@pytest.mark.parametrize("more", [(), ("--compare",), ("--no-compress",)])
def test_frames_that_a_processor_refuses(
    run: Any, clip: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    folder = checkpoints.glm4v(tmp_path)
    code, out, err = run("run", clip, "--model", folder, "--frames", 1, "--json", *more)
    assert (code, out) == (2, "")
    assert len([line for line in err.splitlines() if line.startswith("dycoke: ")]) == 1
    assert "glm4v processor does not take 1 frame" in err
    assert "it needs at least 2; sample more (--frames, frames=)" in err


def test_the_encoder_takes_as_many_frames_as_told(run: Any, clip: Path) -> None:
    args = ("run", clip, "--frames", 9, "--max-new-tokens", 3, "--json", "--encode-frames")
    texts = {json.loads(run(*args, at_once)[1])["text"] for at_once in (2, 100, "auto")}
    assert len(texts) == 1


def test_the_text_and_the_table_go_to_stdout(run: Any, clip: Path) -> None:
    code, out, err = run("run", clip, "--frames", 5, "--max-new-tokens", 5)
    assert code == 0
    assert "DyCoke:" in out and "refreshes" in out and "time to first token" in out
    if not cli_has_trained_model():
        assert "words mean nothing" in " ".join(err.split())


def cli_has_trained_model() -> bool:
    from dycoke import nano

    return nano.is_trained()


def test_frames_that_become_images_are_declared(run: Any, clip: Path, tmp_path: Path) -> None:
    folder = checkpoints.internvl(tmp_path)
    args = ("run", clip, "--model", folder, "--frames", 8, "--max-new-tokens", 4)
    code, out, _ = run(*args, "--compare", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["report"]["engaged"] and result["timings"]["vision_s"] > 0
    (video,) = result["report"]["samples"][0]["videos"]
    assert (video["frames"], video["source"]) == (8, "images")
    assert result["full"]["text"]


def test_the_table_of_models(run: Any, monkeypatch: Any) -> None:
    from dycoke.models import families

    monkeypatch.setattr(lists, "out", Console(width=300))
    code, out, _ = run("models")
    assert code == 0
    for model_type, family in families().items():
        words = [model_type, family.name, *family.checkpoints, *family.notes]
        assert all(word in " ".join(out.split()) for word in words), family.name
    for limit in ("frames are images", "images are never merged", 'no positions="compact"'):
        assert limit in out


def test_the_flops_table(run: Any) -> None:
    code, out, _ = run("flops")
    assert code == 0
    for figure in ("41.4 (41.4)", "24.2 (24.1)", "17.9 (17.9)", "197.2 (195.1)", "1.3 (1.2)"):
        assert figure in out


def test_version_and_help(run: Any) -> None:
    assert run("--version")[1].strip() == dycoke.__version__
    for args in ((), ("--help",)):
        code, out, _ = run(*args)
        assert code == 0 and "Commands" in out


def test_another_stream_and_fewer_pixels(run: Any, tmp_path: Path) -> None:
    path = clips.side_by_side(tmp_path / "two.mkv", 9, 9)
    args = ("run", path, "--frames", 9, "--max-new-tokens", 2, "--json")
    code, out, err = run(*args)
    assert code == 0 and out.count("\n") == 1
    assert f"note: {path}: video streams 0, 1, of which 0 is read" in err
    code, _, err = run(*args, "--stream", 1, "--max-pixels", 9 * 16 * 12)
    assert code == 0 and "video streams" not in err
    assert "frames of 64 x 48 pixels are read at 16 x 12" in err
    code, out, err = run(*args, "--stream", 4)
    assert (code, out) == (2, "")
    assert err.endswith("stream 4 is no video stream; of that kind are: 0, 1\n")


def test_what_cannot_be_read_twice(run: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, message in (
        (tmp_path / "pipe.mp4", "a pipe, and a clip is read twice; save it to a file first"),
        ("-", "no such file; a clip is not read from standard input, save it to a file"),
        (
            clips.claiming_gif(tmp_path / "huge.gif", 16000, 16000, 40),
            "pictures of 16000 x 16000 pixels, more than the limit of 67108864",
        ),
    ):
        code, out, err = run("run", path, "--json")
        assert (code, out) == (2, "")
        assert f"{path}: {message}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "none.mp4"), "none.mp4"),
        (("run", __file__), "test_cli.py"),
        (("run", "{clip}", "--merge-ratio", "1"), "merge_ratio must be in [0, 1), got 1.0"),
        (("run", "{clip}", "--token-budget", "1.5"), "token_budget must be an integer of at"),
        (("run", "{clip}", "--token-budget", "few"), "--token-budget must be a number, got 'few'"),
        (
            ("run", "{clip}", "--token-budget", "9", "--merge-ratio", "0.5"),
            "--merge-ratio and --token-budget exclude each other; drop one",
        ),
        (("eval", "--token-budget", "0"), "token_budget must be an integer of at least 1"),
        (("eval", "--token-budget", "9", "--merge-ratio", "0.7"), "exclude each other; drop one"),
        (("run", "{clip}", "--prune-ratio", "-1"), "prune_ratio must be in [0, 1), got -1.0"),
        (("run", "{clip}", "--prune-layer", "0"), "prune_layer must be at least 1, got 0"),
        (("run", "{clip}", "--prune-layer", "99"), "prune_layer=99 leaves no layer"),
        (("run", "{clip}", "--frames", "0"), "--frames"),
        (("run", "{clip}", "--frames", "many"), "--frames"),
        (("run", "{clip}", "--encode-frames", "1"), "at least 2, got '1'"),
        (("run", "{clip}", "--encode-frames", "all"), "must be auto or a number of at least 2"),
        (("run", "{clip}", "--compare", "--no-compress"), "exclude each other"),
        (("run", "{clip}", "--model", "/no/such/folder"), "/no/such/folder"),
        (("run", "{clip}", "--model", "{folder}"), "cannot load the model"),
        (("run", "{clip}", "--dtype", "float99"), "unknown dtype 'float99'"),
        (("run", "{clip}", "--device", "nonsense"), "nonsense"),
        (("run", "{clip}", "--bogus"), "--bogus"),
        (("eval", "--split", "new"), "--split must be seen or unseen, got 'new'"),
        (("eval", "--merge-ratio", "1"), "merge_ratio must be in [0, 1), got 1.0"),
        (("eval", "--settings", "nothing"), "no setting begins with 'nothing'; there are full"),
        (("eval", "--settings", "full,nope"), "no setting begins with 'nope'; there are full"),
        (("eval", "--settings", ","), "no setting begins with ','; there are full"),
        (("run", "{clip}", "--retention", "25"), "must be in (0, 1], got 25; did you mean 0.25?"),
        (("run", "{clip}", "--retention", "0"), "retention must be in (0, 1], got 0"),
        (("run", "{clip}", "--method", "none"), "unknown method 'none'; there are full, dycoke,"),
        (
            ("run", "{clip}", "--retention", "0.5", "--merge-ratio", "0.5"),
            "retention and merge_ratio both say how many tokens stay; drop one",
        ),
        (
            ("run", "{clip}", "--retention", "0.5", "--token-budget", "9"),
            "retention and token_budget both say how many tokens stay; drop one",
        ),
        (
            ("run", "{clip}", "--method", "visionzip", "--prune-ratio", "0", "--prune-layer", "2"),
            "VisionZip has no setting 'prune_layer', 'prune_ratio'; it has",
        ),
        (
            ("run", "{clip}", "--method", "full", "--retention", "0.5"),
            "keeps everything and has no settings; drop retention",
        ),
        (
            ("run", "{clip}", "--no-compress", "--retention", "0.5"),
            "keeps everything and has no settings; drop retention",
        ),
        (("run", "{clip}", "--no-compress", "--method", "fastv"), "exclude each other; drop one"),
        (("run", "{clip}", "--method", "full", "--compare"), "name another --method"),
        (("run", "{clip}", "--ratio", "0.5"), "--ratio is now --retention, the share of the"),
        (("eval", "--json", "/no/such/folder/x.json"), "there is no such folder"),
        (("run",), "video"),
        (("fly",), "fly"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Any, clip: Path, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    filled = [a.replace("{clip}", str(clip)).replace("{folder}", str(tmp_path)) for a in args]
    code, out, err = run(*filled, *(["--json"] if args[0] == "run" else []))
    lines = [line for line in err.splitlines() if line.startswith("dycoke: ")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_a_fault_of_ours_is_not_hidden(monkeypatch: Any, clip: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("dycoke.assistant.Assistant.ask", broken)
    monkeypatch.setattr(sys, "argv", ["dycoke", "run", str(clip)])
    with pytest.raises(ZeroDivisionError):  # the interpreter shows it, and exits with 1
        cli.main()


@pytest.mark.parametrize("word", ["flops", "--help", "--version"])
def test_the_model_is_loaded_only_when_needed(word: str) -> None:
    """Help and tables must not wait for torch."""
    code = (
        f"import sys; sys.argv = ['dycoke', {word!r}]\n"
        "from dycoke import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


needs_videos = pytest.mark.skipif(not CLIPS, reason="no ../shared/videos beside the project")


@needs_videos
def test_a_damaged_clip_in_a_process_of_its_own() -> None:
    """What FFmpeg writes to the process's own stderr stays away, too."""
    path = VIDEOS / "corrupted.mp4"
    args = [sys.executable, "-c", "from dycoke.cli import main; main()", "run", str(path)]
    args += ["--frames", "33", "--max-new-tokens", "3", "--json"]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    # The model loads while the file is read, up to where it breaks off: its notes come first.
    *notes, error = errors
    assert error.startswith("dycoke: ")
    assert "corrupted.mp4" in error and "28 of 50" in error
    said = " ".join(notes)
    assert re.fullmatch(r"(note: [^:]*)?(number format: .*)?", said), said


@needs_videos
@pytest.mark.parametrize("frames", [1, 5, 33])
@pytest.mark.parametrize("name", CLIPS)
def test_every_real_clip_at_every_frame_count(run: Any, name: str, frames: int) -> None:
    args = ("run", VIDEOS / name, "--frames", frames, "--max-new-tokens", 2, "--json")
    code, out, err = run(*args)
    if name == "corrupted.mp4" and frames > 1:
        assert code == 2 and out == "" and "corrupted.mp4" in err
        return
    assert code == 0, err
    assert json.loads(out)["report"]["samples"][0]["frames"] <= frames


def test_eval_counts_and_writes_json(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    code, out, _ = run("eval", "--stories", 2, "--settings", "full,once", "--merge-ratio", 0.5,
                       "--json", file)  # fmt: skip
    assert code == 0
    assert "describe" in out and "most attended frame" in out
    content = json.loads(file.read_text())
    assert list(content) == ["stories", "seed", "split", "dtype", "results", "attention"]
    assert [r["name"] for r in content["results"]] == ["full", "once K=0.5 P=0.7 L=3"]
    assert content["results"][1]["settings"]["refresh_threshold"] == 0
    assert not list(tmp_path.glob("*.partial"))


def test_the_number_format_is_told_and_can_be_chosen(run: Any, tmp_path: Path, clip: Path) -> None:
    short = ("run", clip, "--frames", 4, "--max-new-tokens", 1, "--json")
    code, out, err = run(*short)
    assert code == 0 and "number format: float32 (the embedded model)" in err
    single = json.loads(out)["report"]["kv_bytes_full"]
    code, out, err = run(*short, "--dtype", "bfloat16")
    assert code == 0 and "number format: bfloat16 (as asked)" in err
    assert json.loads(out)["report"]["kv_bytes_full"] * 2 == single
    file = tmp_path / "scores.json"
    code, _, err = run("eval", "--stories", 1, "--settings", "full", "--dtype", "bfloat16",
                       "--json", file)  # fmt: skip
    assert code == 0 and "number format: bfloat16 (as asked)" in err
    assert json.loads(file.read_text())["dtype"] == "bfloat16"


def test_eval_gives_one_result_per_setting_that_begins_so(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    code, _, err = run("eval", "--stories", 1, "--seed", 7, "--settings", "full,dycoke",
                       "--merge-ratio", 0.7, "--json", file)  # fmt: skip
    assert code == 0, err
    content = json.loads(file.read_text())
    assert (content["stories"], content["seed"]) == (1, 7)
    assert [r["name"] for r in content["results"]] == [
        "full",
        "dycoke K=0.7 P=0.7 L=3",
        "dycoke+ K=0.7 P=0.7 L=3",
    ]
    retentions = [r["retention"] for r in content["results"]]
    assert retentions[0] == 1 > retentions[1] == retentions[2]
    echoes = [r["settings"].get("echo") for r in content["results"]]
    assert echoes == [None, 0, 0.5]


def test_echoes_and_the_scoring_layer_are_options(run: Any, clip: Path) -> None:
    name = ("--method", "visionzip", "--echo", 0.25)
    plus = ("--method", "dycoke+", "--echo-exact", 2, "--score-layer", 5)
    for more, told in (
        (name, {"echo_layers": 2, "exact_layers": 0, "score_layer": None, "scores_late": False}),
        (plus, {"echo_layers": 4, "exact_layers": 2, "score_layer": 5, "scores_late": True}),
        ((), {"echo_layers": 0, "exact_layers": 0, "score_layer": 2, "scores_late": False}),
    ):
        code, out, err = run("run", clip, "--json", "--frames", 8, "--max-new-tokens", 3, *more)
        assert code == 0, err
        report = json.loads(out)["report"]
        assert {key: report[key] for key in told} == told


def test_demo_draws_its_picture(run: Any, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    code, out, _ = run("demo", "--seed", 2, "--picture", picture)
    assert code == 0
    for word in ("truth:", "full:", "DyCoke:", "DyCoke+:", "ratio", "events told right", "saved"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
