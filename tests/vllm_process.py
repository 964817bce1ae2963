"""vLLM in processes of its own: its engine, which reads a job in JSON and prints the answers, and
its server.

A job has ``model``, ``engine`` (settings of ``vllm.LLM``), ``requests`` (each with ``prompt``,
``videos`` and ``images``: files of arrays, and ``max_tokens``), and ``rounds``: which requests are
sent together.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "ANSWERS "


class Ended(Exception):
    """A process of vLLM's ended where it should not; the message is the end of what it said."""


def environment(settings: Mapping[str, Any] | None) -> dict[str, str]:
    """One thread, a cache of 1 GiB, nothing asked of a hub; ``settings`` are dycoke's, or none."""
    kept = {k: v for k, v in os.environ.items() if k != "DYCOKE_VLLM"}
    if settings is not None:
        kept["DYCOKE_VLLM"] = json.dumps(settings)
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }


def answers(job: Mapping[str, Any], settings: Mapping[str, Any] | None) -> Any:
    """What an engine answers to the rounds of a job."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        # Everything in the one process.
        env=environment(settings) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise Ended(f"the engine ended with {done.returncode}:\n{done.stderr[-4000:]}")


@contextmanager
def server(
    model: Path, settings: Mapping[str, Any] | None, *more: str, paths: str | None = None
) -> Iterator[int]:
    """The port of vLLM's OpenAI server, ready, which ends with the block.

    ``more`` are arguments of its own, ``paths`` a PYTHONPATH.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--model", str(model), "--served-model-name", "nano", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"]
    command += ["--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0}), *more]
    surroundings = environment(settings) | ({} if paths is None else {"PYTHONPATH": paths})
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=surroundings, stdout=said, stderr=said)
        try:
            while not _healthy(port):
                if process.poll() is not None:
                    said.seek(0)
                    raise Ended(f"the server ended:\n{said.read()[-4000:]}")
                time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def _healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
    except (urllib.error.URLError, OSError):
        return False
    return True


def about(clip: Path, frames: int, new_tokens: int) -> dict[str, Any]:
    """A request to tell a clip, for `chat`."""
    from dycoke.serve.load import Load, bodies

    load = Load(methods=("full",), video=str(clip), frames=frames, new_tokens=new_tokens)
    body: dict[str, Any] = json.loads(bodies(load)["full"][0])
    # The last of them vLLM takes from its operator.
    for name in ("dycoke", "stream", "stream_options", "media_io_kwargs"):
        del body[name]
    return {**body, "temperature": 0}


def chat(port: int, body: Mapping[str, Any]) -> Any:
    """A chat completion."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def times(count: int, fps: float) -> dict[str, Any]:
    """What both libraries take as a video's metadata, where ``count`` frames are all there are."""
    return {
        "fps": fps,
        "total_num_frames": count,
        "duration": count / fps,
        "frames_indices": list(range(count)),
    }


def main() -> None:
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    job: dict[str, Any] = json.load(sys.stdin)
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "limit_mm_per_prompt": {
            "video": max(len(asked["videos"]) for asked in job["requests"]),
            "image": max(len(asked.get("images", [])) for asked in job["requests"]),
        },
        "seed": 0,
        **job["engine"],
    }
    model = LLM(job["model"], **engine)

    def request(asked: dict[str, Any]) -> dict[str, Any]:
        videos: list[Any] = [np.load(file) for file in asked["videos"]]
        images = [Image.fromarray(np.load(file)) for file in asked.get("images", [])]
        beside = {"image": images} if images else {}
        fps = asked.get("fps")
        if fps is None:
            return {"prompt": asked["prompt"], "multi_modal_data": {"video": videos, **beside}}
        with_times = [
            (
                frames,
                {
                    **times(len(frames), fps),
                    "do_sample_frames": False,
                    "video_backend": "none",
                },
            )
            for frames in videos
        ]
        return {
            "prompt": asked["prompt"],
            "multi_modal_data": {"video": with_times, **beside},
            "mm_processor_kwargs": {"do_sample_frames": False, "fps": fps},
        }

    requests = [request(asked) for asked in job["requests"]]
    answers = []
    for numbers in job["rounds"]:
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=job["requests"][n]["max_tokens"],
                ignore_eos=job.get("ignore_eos", False),
                logprobs=1,
            )
            for n in numbers
        ]
        done = model.generate([requests[n] for n in numbers], sampling, use_tqdm=False)
        answers.append(
            [
                {
                    "prompt_tokens": len(one.prompt_token_ids),
                    "cached_tokens": one.num_cached_tokens,
                    "tokens": list(one.outputs[0].token_ids),
                    "text": one.outputs[0].text,
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(
                            one.outputs[0].logprobs, one.outputs[0].token_ids, strict=True
                        )
                    ],
                }
                for one in done
            ]
        )
    print(MARK + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
