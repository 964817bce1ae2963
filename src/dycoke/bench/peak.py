"""One generation in a process of its own, whose peak memory is then its alone.

That process runs this file: a task as JSON on stdin, bytes or null on stdout.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from dycoke.bench.plan import Plan
from dycoke.bench.speed import Bench
from dycoke.precision import name_of


def peak_of_process(plan: Plan, path: str, method: str) -> int | None:
    """Peak resident memory of a process that runs one method once, in bytes.

    Weights, libraries and interpreter are in it. None where the system does not tell, or, with a
    warning, where that process fails, as when memory runs out.
    """
    # Not for that process to choose anew: a trial may come out otherwise.
    plan = replace(plan, dtype=name_of(plan.number_format.dtype))
    task = {"plan": plan.to_dict(), "path": path, "method": method}
    done = subprocess.run(
        [sys.executable, "-m", "dycoke.bench.peak"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        warnings.warn(f"the peak memory of {method} is unknown: {why}", stacklevel=2)
        return None
    peak: int | None = json.loads(done.stdout)
    return peak


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
    Bench(plan).once(task["path"], plan.lines()[task["method"]], plan.new_tokens)
    json.dump(peak_rss(), sys.stdout)


if __name__ == "__main__":
    main()
