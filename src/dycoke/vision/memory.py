"""How much memory is free, and how many frames a vision encoder can take in a share of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHARE = 0.5  # of what is free: the prompt's embeddings and the language model come after
FALLBACK = 16  # frames, where nothing tells what is free or how wide the encoder is


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated; None where nothing tells.

    CUDA: what the device has left, and what torch's allocator holds unused. CPU and MPS, which
    shares the system's memory: Linux's own estimate, or what the control group (container) has
    left, if that is less. ``root`` is where the system's files are.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type not in ("cpu", "mps"):
        return None
    found = [_system(root / "proc/meminfo"), _control_group(root / "sys/fs/cgroup")]
    return min((free for free in found if free is not None), default=None)


def _system(meminfo: Path) -> int | None:
    kib = _table(meminfo).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _control_group(folder: Path) -> int | None:
    most, used = (_number(folder / f"memory.{name}") for name in ("max", "current"))
    if most is None or used is None:
        return None
    # Files that were read count as used, and make room where it is needed.
    return max(0, most - used + _table(folder / "memory.stat").get("inactive_file", 0))


def _number(file: Path) -> int | None:
    """What stands in a file; None for "max", and where there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def frame_bytes(config: Any, patches: int, item: int) -> int | None:
    """Bytes that the vision encoder holds per frame at its widest moment; None if not known.

    Parameters
    ----------
    config : the model's config.
    patches : per frame (or temporal slice).
    item : bytes of one number.

    Notes
    -----
    ``patches * item * (12 hidden + 3 intermediate)``, on the safe side of one block: its input, q,
    k and v, and what rotating q and k in float32 takes; or its MLP, gated. SDPA and FlashAttention
    hold no attention map; eager attention holds it in four forms, ``4 heads * patches`` more.
    Families that pick a layer's output (``vision_feature_layer``) keep that of every layer in
    older releases: ``layers * hidden`` more.
    """
    vision = getattr(config, "vision_config", None)
    hidden = _first(vision, "embed_dim", "hidden_size")  # Qwen2-VL's hidden_size is the decoder's
    if vision is None or not hidden:
        return None
    inner = _first(vision, "intermediate_size") or hidden * _first(vision, "mlp_ratio", default=4)
    width = 12 * hidden + 3 * inner
    if getattr(config, "vision_feature_layer", None) is not None:
        width += _first(vision, "num_hidden_layers", "depth") * hidden
    if getattr(vision, "_attn_implementation", None) == "eager":
        width += 4 * _first(vision, "num_attention_heads", "num_heads") * patches
    return int(patches * item * width)


def _first(config: Any, *names: str, default: float = 0) -> float:
    """The first of several names under which configs have a number."""
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, (int, float))), default)


def frames_that_fit(config: Any, patches: int, item: int, device: torch.device) -> int:
    """How many frames the vision encoder can take at once in `SHARE` of what is free.

    Parameters
    ----------
    config, patches, item : as in `frame_bytes`.
    device : where the encoder is.

    Returns
    -------
    int, at least 2; `FALLBACK` where nothing tells.
    """
    free, needed = free_memory(device), frame_bytes(config, patches, item)
    if free is None or not needed:
        return FALLBACK
    return max(2, int(SHARE * free) // needed)
