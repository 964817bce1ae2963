"""What happened in one generation, as plain frozen data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class _Readable:
    """Fields as attributes, and by name as in the dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain dictionaries and lists, ready for JSON."""
        result: dict[str, Any] = _plain(asdict(self))  # type: ignore[call-overload]
        return result

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class VideoReport(_Readable):
    """One video: temporal slices, tokens in each, tokens before and after merging.

    ``encoded_tokens`` are those that the vision encoder computed.

    ``source`` is "videos", or "images" where images were declared to be its frames.
    """

    frames: int
    tokens_per_frame: int
    visual_tokens: int
    kept_tokens: int
    encoded_tokens: int
    source: str = "videos"

    @property
    def encoded_share(self) -> float:
        """Share of the visual tokens that the vision encoder computed."""
        return share(self.encoded_tokens, self.visual_tokens)


@dataclass(frozen=True)
class SampleReport(_Readable):
    """One row of generate's batch; counts are summed over its videos.

    ``active_tokens`` is the number of visual tokens that a decode step attends to in the pruned
    layers. ``refreshes`` and ``recalled_tokens`` leave out the first selection. A sample without
    visual tokens has retention 1.
    """

    videos: tuple[VideoReport, ...]
    frames: int
    visual_tokens: int
    kept_tokens: int
    active_tokens: int
    retention: float
    final_retention: float
    refreshes: int
    recalled_tokens: int


@dataclass(frozen=True)
class Report(_Readable):
    """One generation.

    Attributes
    ----------
    engaged : whether anything was compressed; ``reason`` says why not.
    settings : the compressor's settings.
    kv_bytes : bytes of the storages that the cache held after the last forward.
    kv_bytes_full : bytes that a stock cache would have held then.
    decode_steps : forwards after the prefill.
    retention : kept / visual tokens, over all samples; where a method drops tokens inside the
        LLM, the mean over its layers.
    final_retention : share of the visual tokens that the last layer attends to while decoding.
    below : share of the layers that hold all tokens that entered the LLM; less than 1 where a
        method drops some inside it.
    method : the name of the compressor's class.
    echo_layers, exact_layers : how many layers saw echoes of what was merged away while the prompt
        was read, and how many of them computed these; see `Compressor`.
    score_layer : the layer whose attention chooses what a decode step attends to; None where
        nothing is chosen.
    scores_late : whether that layer is itself pruned, so that it multiplies once more by all keys.
    """

    engaged: bool
    reason: str | None
    settings: dict[str, Any]
    kv_bytes: int
    kv_bytes_full: int
    decode_steps: int
    retention: float
    final_retention: float
    samples: tuple[SampleReport, ...]
    method: str
    below: float = 1.0
    echo_layers: int = 0
    exact_layers: int = 0
    score_layer: int | None = None
    scores_late: bool = False

    def __str__(self) -> str:
        if not self.engaged:
            return f"{self.method} did not engage: {self.reason}"
        visual = sum(s.visual_tokens for s in self.samples)
        kept = sum(s.kept_tokens for s in self.samples)
        active = sum(s.active_tokens for s in self.samples)
        refreshes = sum(s.refreshes for s in self.samples)
        recalled = sum(s.recalled_tokens for s in self.samples)
        frames = sum(s.frames for s in self.samples)
        given = {v.source for s in self.samples for v in s.videos}
        given_as = " given as images" if given == {"images"} else ""
        held = f"{kept} ({self.retention:.2%})"
        if self.below < 1:
            held = f"{self.retention:.2%} as a mean over the layers; {kept} enter the first"
        lines = [
            f"{self.method}: {frames} frames{given_as}, {visual} visual tokens in "
            f"{len(self.samples)} sample(s)",
            f"  kept      {held}",
            f"  attended  {active} per decode step ({self.final_retention:.2%})",
            f"  decoding  {self.decode_steps} steps, {refreshes} refreshes, "
            f"{recalled} tokens recalled",
            f"  KV cache  {_size(self.kv_bytes)} instead of {_size(self.kv_bytes_full)}",
        ]
        encoded = sum(v.encoded_tokens for s in self.samples for v in s.videos)
        if encoded < visual:
            lines.insert(1, f"  encoded   {encoded} ({share(encoded, visual):.2%})")
        if self.echo_layers:
            lines.append(
                f"  echoes    in {self.echo_layers} layers, {self.exact_layers} of them exact"
            )
        return "\n".join(lines)


def share(part: float, whole: int) -> float:
    """part / whole, and 1 where there is nothing to take a part of."""
    return part / whole if whole else 1.0


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.2f} GiB"
