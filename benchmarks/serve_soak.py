"""Good, bad and cancelled requests at a server for minutes: nothing is lost or mixed up.

    python benchmarks/serve_soak.py --requests 2000 --minutes 10

Every good request asks about one of a few stories and must get that story's own answer, which was
asked for alone before. Bad ones must get their status. Every sixth client hangs up in the middle.
The server's memory is printed as it goes on, and must be flat over the second half.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dycoke.nano import stories
from dycoke.serve.load import serving

CLIPS = 6
BAD: list[tuple[int, dict[str, Any]]] = [
    (400, {"messages": []}),
    (400, {"temperature": -1}),
    (404, {"model": "another"}),
    (400, {"dycoke": {"merge_ratio": 2}}),
]


def body_of(url: str, **more: Any) -> dict[str, Any]:
    video = {"type": "video_url", "video_url": {"url": url}}
    content = [video, {"type": "text", "text": stories.DESCRIBE[0]}]
    return {
        "messages": [{"role": "user", "content": content}],
        "media_io_kwargs": {"video": {"num_frames": 24}},
        "max_tokens": 16,
        **more,
    }


def post(port: int, body: Any, read: int | None = None) -> tuple[int, bytes]:
    """The status and the body, or its first ``read`` bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(read)
    finally:
        connection.close()


def resident() -> int:
    """MiB of the server, which is this process's child, by /proc."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            status = (entry / "status").read_text()
            own = int(status.split("PPid:")[1].split()[0]) == os.getpid()
            if own and b"dycoke.cli" in command and b"serve" in command:
                return int(status.split("VmRSS:")[1].split()[0]) // 1024
        except (OSError, IndexError):
            continue
    raise SystemExit("there is no server process; this script needs /proc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = []
        for seed in range(CLIPS):
            file = stories.write(stories.make("seen", seed), Path(folder) / "clip.mp4")
            urls.append("data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode())
    counts: Counter[str] = Counter()
    lock, left = threading.Lock(), iter(range(args.requests))
    with serving(["--method", "dycoke", "--cache-mb", "16", "--max-waiting", "8"]) as port:

        def answer(raw: bytes) -> str:
            return str(json.loads(raw)["choices"][0]["message"]["content"])

        settings = [{"off": True}, {"method": "dycoke"}, {"method": "dycoke+"}]
        right = {
            (clip, i): answer(post(port, body_of(urls[clip], dycoke=chosen))[1])
            for clip in range(CLIPS)
            for i, chosen in enumerate(settings)
        }

        def work(number: int) -> str:
            rng = random.Random(number)
            clip, i = rng.randrange(CLIPS), rng.randrange(3)
            if number % 4 == 3:
                status, more = rng.choice(BAD)
                got, _ = post(port, {**body_of(urls[clip]), **more})
                return "bad, refused" if got == status else f"WRONG: {got} for {more}"
            if number % 12 == 2:
                got, _ = post(port, b'{"messages": ')
                return "bad, refused" if got == 400 else f"WRONG: {got} for half a body"
            good = body_of(urls[clip], dycoke=settings[i])
            if number % 6 == 0:
                post(port, {**good, "stream": True, "max_tokens": 400}, read=200)
                return "hung up"
            got, raw = post(port, good)
            while got == 429:
                with lock:
                    counts["(told that the queue is full, and asked again)"] += 1
                time.sleep(0.2)
                got, raw = post(port, good)
            if got != 200:
                return f"WRONG: {got} {raw[:200]!r}"
            return "right" if answer(raw) == right[clip, i] else f"WRONG: another answer {raw!r}"

        def client() -> None:
            while time.monotonic() < deadline:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                try:
                    said = work(number)
                except Exception as error:
                    said = f"WRONG: {type(error).__name__} {error}"
                with lock:
                    counts[said] += 1

        threads = [threading.Thread(target=client) for _ in range(args.clients)]
        began = time.monotonic()
        deadline = began + 60 * args.minutes  # a machine that is busy starts a server slowly
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append(resident())
            print(f"{time.monotonic() - began:6.0f} s  {sum(counts.values()):5} requests"
                  f"  {memory[-1]} MiB", flush=True)  # fmt: skip
            time.sleep(min(15.0, max(0.5, args.minutes * 2)))
        memory.append(resident())
    for said, count in sorted(counts.items()):
        print(f"{count:6}  {said}")
    half = memory[len(memory) // 2 :]
    wrong = sum(count for said, count in counts.items() if said.startswith("WRONG"))
    result = {
        "requests": sum(n for said, n in counts.items() if said[0] != "("),
        "wrong": wrong,
        "right": counts["right"],
        "memory_mib": [memory[0], half[0], memory[-1]],
    }
    print(json.dumps(result))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
