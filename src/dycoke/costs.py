"""FLOPs of the language model, by the formula that the paper's table uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one generation, counted as the paper counts them."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Shape:
    """What the formula needs to know of a language model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int


# LLaVA-OneVision's language models (Qwen2), the ones in the paper's table.
PAPER_SHAPES = {
    "0.5B": Shape(896, 4864, 24),
    "7B": Shape(3584, 18944, 28),
    "72B": Shape(8192, 29568, 80),
}
PAPER_TOKENS = 32 * 196  # frames x tokens per frame
# Name -> (merge_ratio, prune_ratio), and the paper's TFLOPs per size where it states them.
PAPER_SETTINGS = {
    "full": (0.0, 0.0),
    "K=0.3 P=0.7": (0.3, 0.7),
    "K=0.5 P=0.7": (0.5, 0.7),
    "K=0.7 P=0.7": (0.7, 0.7),
}
PAPER_TFLOPS: dict[str, dict[str, float]] = {
    "0.5B": {"full": 3.4, "K=0.3 P=0.7": 2.4, "K=0.5 P=0.7": 1.8, "K=0.7 P=0.7": 1.2},
    "7B": {"full": 41.4, "K=0.3 P=0.7": 30.8, "K=0.5 P=0.7": 24.1, "K=0.7 P=0.7": 17.9},
    "72B": {"full": 436.1, "K=0.5 P=0.7": 262.5, "K=0.7 P=0.7": 195.1},
}


def nominal_retention(merge_ratio: float, window: int = 4) -> float:
    """Share of visual tokens that stays after merging full windows, before any rounding."""
    return (1 + (window - 1) * (1 - merge_ratio)) / window


def flops(
    visual_tokens: float,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    retention: float = 1.0,
    prune_ratio: float = 0.0,
    new_tokens: int = 100,
) -> Flops:
    """FLOPs of prefill and decoding over visual tokens, as in the paper's table.

    Parameters
    ----------
    visual_tokens : number of visual tokens before compression (frames x tokens per frame).
    hidden_size, intermediate_size, num_layers : the language model's d, m and T.
    retention : share of visual tokens left by merging, in (0, 1].
    prune_ratio : share of the remaining ones that a decode step does not attend to, in [0, 1).
    new_tokens : generated tokens R.

    Returns
    -------
    Flops
        ``prefill = T (4 n d^2 + 2 n^2 d + 2 n d m)`` with n = retention * visual_tokens, and
        ``decode = T * sum over i < R of (4 d^2 + 2 d m + 2 (n' + i) d)`` with
        n' = (1 - prune_ratio) n. Text tokens and rounding of counts are left out, as there.
    """
    for name, value in (
        ("visual_tokens", visual_tokens),
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("num_layers", num_layers),
        ("new_tokens", new_tokens),
    ):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    if not 0 < retention <= 1:
        raise ValueError(f"retention must be in (0, 1], got {retention!r}")
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio must be in [0, 1), got {prune_ratio!r}")
    kept = retention * visual_tokens
    shape = Shape(hidden_size, intermediate_size, num_layers)
    return counted(kept, (1 - prune_ratio) * kept, shape, new_tokens)


def counted(kept: float, attended: float, shape: Shape, new_tokens: int = 100) -> Flops:
    """The same formula on counts: visual tokens prefilled, and attended to by a decode step."""
    n, d, m, layers = kept, shape.hidden_size, shape.intermediate_size, shape.num_layers
    prefill = layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    # The sum over i of (attended + i) has a closed form.
    context = new_tokens * attended + new_tokens * (new_tokens - 1) / 2
    decode = layers * (new_tokens * (4 * d**2 + 2 * d * m) + 2 * d * context)
    return Flops(prefill=float(prefill), decode=float(decode))


def paper_setting(size: str, setting: str) -> Flops:
    """FLOPs of a line of the paper's table, such as ("7B", "K=0.7 P=0.7"), nominal counts."""
    shape, (merge_ratio, prune_ratio) = PAPER_SHAPES[size], PAPER_SETTINGS[setting]
    return flops(
        PAPER_TOKENS,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_layers,
        retention=nominal_retention(merge_ratio),
        prune_ratio=prune_ratio,
    )
