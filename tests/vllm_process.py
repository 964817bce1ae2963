"""vLLM's engine in a process of its own: reads a job in JSON, prints the answers in JSON.

    DYCOKE_VLLM='{"merge_ratio": 0.7}' python vllm_process.py < job.json

A job has ``model``, ``engine`` (settings of ``vllm.LLM``), ``requests`` (each with ``prompt``,
``videos`` and ``images``: files of arrays, and ``max_tokens``), and ``rounds``: which requests are
sent together.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MARK = "ANSWERS "

# One thread, its own cache of 1 GiB, nothing asked of a hub, everything in this process.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
)


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
                    "fps": fps,
                    "total_num_frames": len(frames),
                    "duration": len(frames) / fps,
                    "frames_indices": list(range(len(frames))),
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
