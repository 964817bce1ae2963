"""StoryQA by lmms-eval, beside our own evaluation of the same stories; offline, with nano.

Writes stories as video files and runs `python -m lmms_eval --model dycoke` on them in a process of
its own, once per method; then `dycoke eval`'s machinery on the rendered frames.

    python benchmarks/lmms_storyqa.py --stories 50
    python benchmarks/lmms_storyqa.py --stories 50 --venv /tmp/lmms-venv   # makes it where missing

Prediction: lossless files (the default) hold the very frames, so that both count the same answers
right, up to ties that rounding decides (lmms-eval asks one by one, ours in batches). With --lossy
(H.264, 4:2:0) the frames differ, and a few answers may.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
DYCOKE = {"merge_ratio": 0.7, "prune_ratio": 0.7, "prune_layer": 3}
TASKS = ("ask", "describe")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with lmms-eval and this checkout; made where missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        command = [python, "-m", "pip", "install", "--editable", f"{HERE.parent}[eval]"]
        subprocess.run(command, check=True)
    return python


def write_lossless(story, path: Path) -> None:
    """Every pixel as it was rendered: FFV1, RGB."""
    import av

    from dycoke.nano import stories

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(stories.FPS))
        stream.width = stream.height = stories.SIZE
        stream.pix_fmt = "bgr0"
        for picture in stories.render(story):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_task(folder: Path, split: str, first: int, count: int, lossy: bool) -> None:
    """Video files, and a line per question."""
    from dycoke.nano import stories

    with (folder / "stories.jsonl").open("w") as lines:
        for seed in range(first, first + count):
            story = stories.make(split, seed)
            path = folder / f"{seed}.{'mp4' if lossy else 'mkv'}"
            (stories.write if lossy else write_lossless)(story, path)
            asked = [("ask", *pair) for pair in stories.questions(story)]
            asked.append(("describe", stories.DESCRIBE[0], stories.describe(story)))
            for task, question, truth in asked:
                line = {"story": seed, "split": split, "video": str(path), "task": task}
                lines.write(json.dumps(line | {"question": question, "truth": truth}) + "\n")


def by_lmms_eval(python: Path, folder: Path, name: str, args: str, more: list[str]) -> dict:
    """Counts (right, of how many) by task and story, from the samples that lmms-eval logs."""
    out = folder / name
    command = [
        python, "-m", "lmms_eval", "--model", "dycoke", "--model_args", args, "--tasks", "storyqa",
        "--include_path", HERE / "lmms_storyqa", "--batch_size", "1", "--output_path", out,
        "--log_samples", *more,
    ]  # fmt: skip
    print("$ python", " ".join(map(str, command[1:])), flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, text=True, capture_output=True
    )
    samples = sorted(out.rglob("*samples_storyqa.jsonl"))
    if not samples:  # lmms-eval ends with 0 after an error, too
        sys.exit(done.stdout[-6000:] + done.stderr[-6000:])
    for line in done.stdout.splitlines():
        if "dycoke compressed" in line or line.startswith("|storyqa"):
            print(re.sub(r"\x1b\[\d+m", "", line).rpartition(" - ")[2])
    docs = [json.loads(line) for line in (folder / "stories.jsonl").read_text().splitlines()]
    counts: dict = {task: defaultdict(lambda: (0, 0)) for task in TASKS}
    for line in samples[-1].read_text().splitlines():
        sample = json.loads(line)
        doc = docs[sample["doc_id"]]
        before, new = counts[doc["task"]][doc["story"]], sample[doc["task"]]
        counts[doc["task"]][doc["story"]] = (before[0] + new[0], before[1] + new[1])
    return counts


def by_dycoke_eval(split: str, first: int, count: int) -> dict[str, dict]:
    """The same of our own evaluation, by method."""
    from dycoke import DyCoke
    from dycoke.assistant import Assistant
    from dycoke.evaluate.storyqa import Setting, evaluate

    lines = [Setting("full", "full", None), Setting("dycoke", "dycoke", DyCoke(**DYCOKE))]
    scores = evaluate(Assistant.load(device="cpu"), lines, split, first, count)
    return {
        name: {task: dict(enumerate(getattr(score, task), first)) for task in TASKS}
        for name, score in scores.items()
    }


def total(counts: dict) -> str:
    right, of = (sum(column) for column in zip(*counts.values(), strict=True))
    return f"{100 * right / of:6.2f} % ({right}/{of})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first story")
    parser.add_argument("--split", default="seen", choices=("seen", "unseen"))
    parser.add_argument("--lossy", action="store_true", help="H.264 instead of lossless files")
    parser.add_argument(
        "--model-args",
        default="pretrained=nano,max_frames_num=24",
        help="such as base=llava_hf,pretrained=NANO,...; NANO becomes the embedded model's folder",
    )
    parser.add_argument("--force-simple", action="store_true", help="the simple class of a base")
    parser.add_argument("--venv", type=Path, help="environment with lmms-eval [default: this one]")
    args = parser.parse_args()

    from dycoke import nano

    python = Path(sys.executable) if args.venv is None else environment(args.venv.resolve())
    model = args.model_args.replace("NANO", str(nano.path()))
    more = ["--device", "cpu"] + ["--force_simple"] * args.force_simple
    dycoke = ",".join(f"{name}={value}" for name, value in DYCOKE.items())
    theirs = {}
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), args.split, args.seed, args.stories, args.lossy)
        for name, method in (("full", "method=full"), ("dycoke", f"method=dycoke,{dycoke}")):
            theirs[name] = by_lmms_eval(python, Path(folder), name, f"{model},{method}", more)
    ours = by_dycoke_eval(args.split, args.seed, args.stories)
    print(f"{'':18}{'lmms-eval':>22}{'dycoke eval':>24}  stories that differ")
    for name, counts in theirs.items():
        for task in TASKS:
            differ = sum(counts[task][s] != ours[name][task][s] for s in ours[name][task])
            figures = f"{total(counts[task]):>22}{total(ours[name][task]):>24}"
            print(f"{name + ' ' + task:18}{figures}  {differ}")


if __name__ == "__main__":
    main()
