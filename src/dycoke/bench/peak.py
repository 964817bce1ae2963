"""One generation in a process of its own, whose peak memory is then its alone.

A task as JSON on stdin, bytes or null on stdout; see `dycoke.bench.speed.peak_of_process`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from dycoke import methods
from dycoke.bench.speed import Bench, Plan


def peak_rss() -> int | None:
    """Most resident memory of this process so far, in bytes."""
    with contextlib.suppress(OSError):
        # Linux's getrusage goes on counting from the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


def main() -> None:
    task = json.load(sys.stdin)
    plan = Plan.from_dict(task["plan"])
    Bench(plan).once(task["path"], methods.create(task["method"], plan.ratio), plan.new_tokens)
    json.dump(peak_rss(), sys.stdout)


if __name__ == "__main__":
    main()
