"""DyCoke inside vLLM: videos are merged over time before they enter the LLM.

A plug-in by vLLM's own door (entry point ``vllm.general_plugins``), asleep unless the environment
variable ``DYCOKE_VLLM`` has settings::

    DYCOKE_VLLM='{"merge_ratio": 0.7}' vllm serve Qwen/Qwen2.5-VL-7B-Instruct

Only the first of DyCoke's two stages is there: a paged cache cannot choose rows per step. Kept
tokens stand where they would in the whole video. docs/vllm.md has what was proven.
"""

from __future__ import annotations

import os

VARIABLE = "DYCOKE_VLLM"


def register() -> None:
    """What vLLM calls in each of its processes; does nothing where ``DYCOKE_VLLM`` is not set."""
    if os.environ.get(VARIABLE, "").strip():
        # Only now: vLLM calls this for everyone who has both packages.
        from dycoke.vllm.plugin import install

        install()
