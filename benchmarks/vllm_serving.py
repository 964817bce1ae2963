"""DyCoke inside vLLM: what nano still tells right, and how many requests a server answers.

Runs in the environment that ``make test-vllm`` makes. One JSON line comes last.

    .venv-vllm/bin/python benchmarks/vllm_serving.py accuracy --stories 100
    .venv-vllm/bin/python benchmarks/vllm_serving.py speed --model nano --frames 96
    .venv-vllm/bin/python benchmarks/vllm_serving.py speed --model qwen2_5_vl

`accuracy` asks StoryQA's questions of nano under each setting, one engine after another. `speed`
starts a server per setting and asks all of them in turn, at several concurrencies. vLLM's own EVS
is there for the Qwens only, and the tiny one here has random weights: its rows compare costs. Its
VidCom2 is for Qwen3-VL, where both of its methods fail in 0.32 (docs/decisions.md).

Predictions, before the first run. Accuracy: DyCoke's as `dycoke eval` finds it with P = 0 (kept
positions make both the same), EVS and random behind it. Speed at 24 frames: no gain that the clock
can tell, since nano's decoder is a small part of a request; at 96 frames time to the first token at
most 1.3x shorter, as clips are read and encoded in full. Measured (docs/vllm.md): EVS ahead of
DyCoke by 2 points, within the intervals; 1.04x to 1.19x on the tiny Qwen; at 96 frames of nano the
first token came 1.6x sooner with one request at a time, so that prediction was too low.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import vllm_checkpoints  # type: ignore[import-not-found]
import vllm_process  # type: ignore[import-not-found]

from dycoke.bench.results import origin
from dycoke.evaluate.storyqa import ANSWER_TOKENS, TASKS, Scores, accuracy, prompts_about
from dycoke.nano import stories
from dycoke.serve.load import CLIPS, turn_of

RETENTION = 0.4583  # of nano's tokens at K = .7; the Qwen sees six frames, and keeps 230 of 432
SETTINGS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "dycoke K=0.3": {"merge_ratio": 0.3},
    "dycoke K=0.5": {"merge_ratio": 0.5},
    "dycoke K=0.7": {"merge_ratio": 0.7},
    "EVS, as much kept": {"method": "evs", "ratio": 1 - RETENTION},
    "random, as much kept": {"method": "random", "merge_ratio": 0.7},
}
SERVERS: dict[str, dict[str, tuple[dict[str, Any] | None, list[str]]]] = {
    "nano": {
        "full": (None, []),
        "dycoke K=0.7": (SETTINGS["dycoke K=0.7"], []),
        "EVS (dycoke's), as much kept": (SETTINGS["EVS, as much kept"], []),
    },
    "qwen2_5_vl": {
        "full": (None, []),
        "dycoke K=0.7": (SETTINGS["dycoke K=0.7"], []),
        "EVS (vLLM's), as much kept": (None, ["--video-pruning-rate", str(1 - 230 / 432)]),
    },
}


def stock_repair(folder: Path) -> str:
    """A folder for PYTHONPATH that lets vLLM's own EVS and VidCom2 run on a CPU.

    Its runner there does not ask whether videos are pruned, which dycoke.vllm sees to for itself.
    """
    (folder / "dycoke_repair.py").write_text(
        "from dycoke.vllm.plugin import tell_the_cpu_runner as register\n"
    )
    about = folder / "dycoke_repair-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dycoke-repair\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ndycoke_repair = dycoke_repair:register\n"
    )
    return str(folder)


def tell_stories(args: argparse.Namespace) -> dict[str, Any]:
    """StoryQA of nano in vLLM, one engine per setting."""
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = vllm_checkpoints.llava_onevision(folder)
        processor = AutoProcessor.from_pretrained(model)
        told = [stories.make("seen", args.seed + i) for i in range(args.stories)]
        rows, requests = [], []
        for place, story in enumerate(told):
            clip = str(folder / f"{place}.npy")
            np.save(clip, stories.render(story))
            for task in TASKS:
                for row in prompts_about(place, story, task):
                    content = [{"type": "video"}, {"type": "text", "text": row.question}]
                    prompt = processor.apply_chat_template(
                        [{"role": "user", "content": content}],
                        add_generation_prompt=True,
                        tokenize=False,
                    )
                    rows.append(row)
                    most = ANSWER_TOKENS[task]
                    requests.append({"prompt": prompt, "videos": [clip], "max_tokens": most})
        found: dict[str, Scores] = {}
        table = []
        for name, settings in SETTINGS.items():
            scores = found[name] = Scores(ask=[(0, 0)] * len(told), describe=[(0, 0)] * len(told))
            job = {"model": str(model), "engine": {}, "requests": requests}
            said = vllm_process.answers({**job, "rounds": [[*range(len(requests))]]}, settings)[0]
            for row, one in zip(rows, said, strict=True):
                scores.count(row, one["text"], told[row.story], (0, 0, 0))
            full = found["full"] if name != "full" else None
            line = {
                "name": name,
                "settings": settings,
                "prompt_tokens": statistics.mean(one["prompt_tokens"] for one in said),
                **{task: accuracy(scores, task, full) for task in TASKS},
            }
            table.append(line)
            print(
                f"{name:22} prompt {line['prompt_tokens']:7.1f}",
                *(f"{t} {line[t]['correct'] / line[t]['n']:6.1%}" for t in TASKS),
                flush=True,
            )
    return {"stories": args.stories, "seed": args.seed, "table": table}


def asked_about(frames: int, new_tokens: int) -> list[dict[str, Any]]:
    """Requests, each about a story of its own that is as long as asked for."""
    asked = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(CLIPS):
            clip = Path(folder) / f"{seed}.mp4"
            stories.write(stories.make("seen", seed, frames=frames), clip)
            body = vllm_process.about(clip, frames, new_tokens)
            asked.append({**body, "ignore_eos": True})
    return asked


def server_of(
    stack: ExitStack, model: Path, frames: int, settings: dict[str, Any] | None, more: list[str]
) -> int:
    """The port of a server that keeps nothing from one request to the next."""
    own = ["--max-num-batched-tokens", "4096"]  # at least a video's tokens
    own += ["--media-io-kwargs", json.dumps({"video": {"num_frames": frames}})]
    own += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--disable-log-stats"]
    paths = None
    if "--video-pruning-rate" in more:
        paths = stock_repair(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    port: int = stack.enter_context(vllm_process.server(model, settings, *own, *more, paths=paths))
    return port


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Requests per second and time to the first token, all servers in turn."""
    asked = asked_about(args.frames, args.new_tokens)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    sent = [json.dumps({**body, **streamed}).encode() for body in asked]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        make = "llava_onevision" if args.model == "nano" else args.model
        model = getattr(vllm_checkpoints, make)(Path(scratch))
        ports: dict[str, int] = {}
        lines: list[dict[str, Any]] = []
        for name, (settings, more) in SERVERS[args.model].items():
            ports[name] = server_of(stack, model, args.frames, settings, more)
            usage = vllm_process.chat(ports[name], asked[0])["usage"]  # warms it up, too
            lines.append({"name": name, "prompt_tokens": usage["prompt_tokens"]})
            print(f"{name:32} prompt {lines[-1]['prompt_tokens']}", flush=True)
        for at_once in args.concurrency:
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
            for _ in range(args.repeat):
                for name, port in ports.items():
                    count = max(args.requests, 2 * at_once)
                    turns[name].append(turn_of(port, sent, at_once, count))
            for line in lines:
                own = turns[line["name"]]
                middle = {k: statistics.median(turn[k] for turn in own) for k in own[0]}
                line[f"at_once_{at_once}"] = middle
                print(
                    f"{line['name']:32} {at_once:3} at once: {middle['requests_per_s']:.2f} "
                    f"requests/s, first token {middle['ttft_s']:.2f} s",
                    flush=True,
                )
    settings = {k: getattr(args, k) for k in ("model", "frames", "new_tokens", "repeat")}
    return {**settings, "table": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("accuracy")
    told.add_argument("--stories", type=int, default=100)
    told.add_argument("--seed", type=int, default=0)
    timed = commands.add_parser("speed")
    timed.add_argument("--model", choices=[*SERVERS], default="nano")
    timed.add_argument("--frames", type=int, default=24)
    timed.add_argument("--new-tokens", type=int, default=16)
    timed.add_argument("--requests", type=int, default=16)
    timed.add_argument("--repeat", type=int, default=3)
    timed.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    for command in (told, timed):
        command.add_argument("--json", type=Path, help="File for the result.")
    args = parser.parse_args()
    found = tell_stories(args) if args.command == "accuracy" else measure(args)
    import vllm

    content = origin(["python", *sys.argv], "cpu")
    content["versions"]["vllm"] = vllm.__version__
    content |= {"cores": os.cpu_count(), **found}
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
