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


@dataclass(frozen=True)
class Extras:
    """What this library adds to the paper's method, as the formula counts it.

    Attributes
    ----------
    echoes : merged tokens that the frames of a prompt still see, as keys and values.
    layers, exact : layers in which they do, and those of them that compute the echoes.
    seen : share of the echoes that one query sees, see `seen_share`.
    scored : visual tokens that a pruned layer scores in each decode step.
    """

    echoes: float = 0.0
    layers: int = 0
    exact: int = 0
    seen: float = 1.0
    scored: float = 0.0

    def prefill(self, kept: float, shape: Shape) -> float:
        """``layers (2 e d^2 + 2 n s e d) + exact (2 e d^2 + 2 e (n + s e) d + 2 e d m)``.

        n kept tokens, e echoes of which a query sees the share s. Echoes have keys and values in
        all layers, and queries, outputs and an MLP in the exact ones.
        """
        n, e, d, m = kept, self.echoes, shape.hidden_size, shape.intermediate_size
        all_layers = 2 * e * d**2 + 2 * n * self.seen * e * d
        exact = 2 * e * d**2 + 2 * e * (n + self.seen * e) * d + 2 * e * d * m
        return self.layers * all_layers + self.exact * exact

    def decode(self, shape: Shape, new_tokens: int) -> float:
        """A product of the newest query and all visual keys, in one layer, per step."""
        return new_tokens * self.scored * shape.hidden_size


NO_EXTRAS = Extras()


def seen_share(frames: int, reach: int) -> float:
    """Share of a video's echoes that a frame sees which sees those of ``reach`` frames before."""
    return min(1.0, (reach + 1) / frames) if frames else 1.0


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
    *,
    echo_layers: int = 0,
    exact_layers: int = 0,
    seen: float = 1.0,
    scores_late: bool = False,
) -> Flops:
    """FLOPs of prefill and decoding over visual tokens, as in the paper's table.

    Parameters
    ----------
    visual_tokens : number of visual tokens before compression (frames x tokens per frame).
    hidden_size, intermediate_size, num_layers : the language model's d, m and T.
    retention : share of visual tokens left by merging, in (0, 1].
    prune_ratio : share of the remaining ones that a decode step does not attend to, in [0, 1).
    new_tokens : generated tokens R.
    echo_layers, exact_layers, seen, scores_late : this library's additions, see `Extras`; the
        echoes are the tokens that merging takes away.

    Returns
    -------
    Flops
        ``prefill = T (4 n d^2 + 2 n^2 d + 2 n d m)`` with n = retention * visual_tokens, and
        ``decode = T * sum over i < R of (4 d^2 + 2 d m + 2 (n' + i) d)`` with
        n' = (1 - prune_ratio) n, and `Extras` beside them. Text tokens and rounding of counts are
        left out, as there.
    """
    for name, value in (
        ("visual_tokens", visual_tokens),
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("num_layers", num_layers),
        ("new_tokens", new_tokens),
        ("echo_layers", echo_layers),
        ("exact_layers", exact_layers),
    ):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    if not 0 < retention <= 1:
        raise ValueError(f"retention must be in (0, 1], got {retention!r}")
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio must be in [0, 1), got {prune_ratio!r}")
    if not 0 <= seen <= 1:
        raise ValueError(f"seen must be in [0, 1], got {seen!r}")
    if not exact_layers <= echo_layers <= num_layers:
        raise ValueError(
            f"exact_layers={exact_layers} must not be above echo_layers={echo_layers}, nor that "
            f"above num_layers={num_layers}"
        )
    kept = retention * visual_tokens
    extras = Extras(
        visual_tokens - kept, echo_layers, exact_layers, seen, kept if scores_late else 0.0
    )
    shape = Shape(hidden_size, intermediate_size, num_layers)
    return counted(kept, (1 - prune_ratio) * kept, shape, new_tokens, extras)


def counted(
    kept: float, attended: float, shape: Shape, new_tokens: int = 100, extras: Extras = NO_EXTRAS
) -> Flops:
    """The same formula on counts: visual tokens prefilled, and attended to by a decode step."""
    n, d, m, layers = kept, shape.hidden_size, shape.intermediate_size, shape.num_layers
    prefill = layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    # The sum over i of (attended + i) has a closed form.
    context = new_tokens * attended + new_tokens * (new_tokens - 1) / 2
    decode = layers * (new_tokens * (4 * d**2 + 2 * d * m) + 2 * d * context)
    prefill += extras.prefill(kept, shape)
    decode += extras.decode(shape, new_tokens)
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
