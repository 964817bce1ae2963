"""Results for people: tables for the terminal, and bars per stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dycoke import costs

TIMES = {
    "decode_s": "decode",
    "process_s": "process",
    "vision_s": "vision",
    "compress_s": "compress",
    "prefill_s": "prefill",
    "ttft_s": "TTFT",
    "per_token_s": "token",
    "total_s": "total",
}
MIB = 2**20

# The picture, in pixels.
WIDTH, BAR, GAP, MARGIN, FIGURES = 960, 26, 12, 16, 150
INK, PAPER = (30, 30, 30), (255, 255, 255)
STAGE_COLOURS = {
    "video": (170, 170, 170),
    "processor": (120, 120, 120),
    "vision encoder": (86, 180, 233),
    "compression": (213, 94, 0),
    "prefill": (0, 114, 178),
    "decoding": (240, 190, 60),
}


def title(head: dict[str, Any]) -> list[str]:
    """Lines that say what was measured, and what was cut."""
    name = head["arch"] if head["model"] is None else f"{head['model']} ({head['arch']})"
    parts = [
        f"{name}, {head['frames']} frames, {head['visual_tokens']} visual tokens",
        f"{head['new_tokens']} new tokens, batch {head['batch']}, {head['dtype']}, "
        f"{head['hardware']} ({head['device']}, threads: {head['threads']})",
    ]
    if head["model"] is None:
        parts.append("random weights")
    if head["layers_cut"]:
        cut = head["layers_cut"].items()
        parts.append("CUT to " + ", ".join(f"{a} of {b} {what} layers" for what, (a, b) in cut))
    return parts


def speed_tables(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Times and sizes, both narrow enough for 80 columns."""
    times = Table(
        title="\n".join([*title(head), "seconds, medians"]), box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    sizes = Table(
        title="tokens of a prompt, memory, FLOPs by formula", box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    # Names of several words may take several lines; figures must not.
    widest = max(len(word) for row in rows for word in row["method"].split())
    times.add_column("method", min_width=widest)
    for name in TIMES.values():
        times.add_column(name, justify="right", no_wrap=True)
    sizes.add_column("method", min_width=widest)
    for name in ("encoded", "kept", "attended", "KV, MiB", "peak, MiB", "TFLOPs"):
        sizes.add_column(name, justify="right")
    for row in rows:
        lines = {row["method"]: "stages", "  least": "stages_min", "  most": "stages_max"}
        for name, key in lines.items():
            times.add_row(name, *(_short(row[key][stage]) for stage in TIMES))
        if _compared(row):
            times.add_row("  vs full", *(_ratio(row, stage) for stage in TIMES))
        whole = row["visual_tokens"] or 1
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}"
        sizes.add_row(
            row["method"],
            f"{row['encoded_tokens']}",
            f"{row['kept_tokens']}",
            f"{row['active_tokens']}",
            f"{row['kv_bytes'] / MIB:.1f}",
            peak,
            f"{row['flops'] / 1e12:.3g}",
        )
        share = [
            f"{row[key] / whole:.1%}" for key in ("encoded_tokens", "kept_tokens", "active_tokens")
        ]
        less = [_ratio(row, key) for key in ("kv_bytes", "peak_bytes", "flops")]
        if _compared(row):
            sizes.add_row("  vs full", *share, *less)
    return [times, sizes]


def _short(seconds: float) -> str:
    """Three digits, and never an exponent."""
    return f"{seconds:.{3 if seconds < 1 else 2 if seconds < 10 else 1}f}"


def _compared(row: dict[str, Any]) -> bool:
    return bool(row["vs_full"]) and row["method"] != "full"


def _ratio(row: dict[str, Any], key: str) -> str:
    ratio = (row["vs_full"] or {}).get(key)
    return "-" if ratio is None else f"{ratio:.2f}x"


def parts(row: dict[str, Any]) -> dict[str, float]:
    """The stages of which a bar is stacked, in seconds; their sum is the median total."""
    stages = row["stages"]
    shares = {
        "video": stages["decode_s"],
        "processor": stages["process_s"],
        "vision encoder": stages["vision_s"],
        "compression": stages["compress_s"],
        "prefill": stages["prefill_s"],
    }
    # Medians need not add up: what is left is decoding, and at least nothing.
    return {**shares, "decoding": max(0.0, stages["total_s"] - sum(shares.values()))}


def bars(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Image.Image:
    """A stacked bar per method, stage by stage, with the range of the total as a line."""
    font = ImageFont.load_default(13)
    lines = title(head)
    start = 2 * MARGIN + max(font.getlength(row["method"]) for row in rows)
    top = MARGIN + len(lines) * 18 + 30
    height = top + len(rows) * (BAR + GAP) + MARGIN
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 18 * i), line, INK, font)
    x = start
    for name, colour in STAGE_COLOURS.items():
        pen.rectangle((x, top - 24, x + 12, top - 12), fill=colour)
        pen.text((x + 18, top - 26), name, INK, font)
        x += 130
    longest = max(max(row["stages_max"]["total_s"], sum(parts(row).values())) for row in rows)
    scale = (WIDTH - start - FIGURES) / (longest or 1.0)
    for i, row in enumerate(rows):
        y, seconds = top + i * (BAR + GAP), 0.0
        pen.text((MARGIN, y + 5), row["method"], INK, font)
        for name, length in parts(row).items():
            left, seconds = start + seconds * scale, seconds + length
            right = start + seconds * scale
            if right > left:
                pen.rectangle((left, y, right, y + BAR), fill=STAGE_COLOURS[name])
        low, high = (start + row[k]["total_s"] * scale for k in ("stages_min", "stages_max"))
        pen.line((low, y + BAR // 2, high, y + BAR // 2), fill=INK, width=2)
        for end in (low, high):
            pen.line((end, y + BAR // 2 - 4, end, y + BAR // 2 + 4), fill=INK, width=2)
        text = f"{_short(row['stages']['total_s'])} s"
        if _compared(row):
            text += f" ({_ratio(row, 'total_s')} as fast)"
        pen.text((WIDTH - FIGURES + 12, y + 5), text, INK, font)
    return image


def paper_flops() -> Table:
    """The FLOPs formula at the paper's settings, beside the paper's own figures."""
    table = Table(title="LLaVA-OneVision, TFLOPs (paper's figure): 32 frames x 196 tokens, 100 new")
    table.add_column("size", no_wrap=True)
    for name in costs.PAPER_SETTINGS:
        table.add_column(name, justify="right")
    for size in costs.PAPER_SHAPES:
        row = []
        for name in costs.PAPER_SETTINGS:
            paper = costs.PAPER_TFLOPS[size].get(name, "-")
            row.append(f"{costs.paper_setting(size, name).total / 1e12:.1f} ({paper})")
        table.add_row(size, *row)
    return table
