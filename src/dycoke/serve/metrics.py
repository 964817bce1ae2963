"""Counters, in the text that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

HELP = {
    "dycoke_requests_total": "Chat completions by HTTP status.",
    "dycoke_prompt_tokens_total": "Tokens of prompts, before compression.",
    "dycoke_generated_tokens_total": "Tokens of answers.",
    "dycoke_visual_tokens_total": "Visual tokens of prompts.",
    "dycoke_visual_tokens_kept_total": "Visual tokens that were left after compression.",
    "dycoke_first_token_seconds_total": "Seconds from a request to its first text, added up.",
    "dycoke_request_seconds_total": "Seconds from a request to its end, added up.",
}


class Metrics:
    """Counts, by name and label."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        with self._lock:
            self._counts[name, label] += amount  # type: ignore[assignment]

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, and what is so at this moment."""
        with self._lock:
            counts = dict(self._counts)
        lines = []
        for name, what in HELP.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} counter"]
            own = {label: count for (key, label), count in counts.items() if key == name}
            for label, count in sorted(own.items() if own else [("", 0)]):
                lines.append(f"{name}{label} {count:.10g}")
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:.10g}"]
        return "\n".join(lines) + "\n"
