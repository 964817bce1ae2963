"""Where skipping in the encoder holds: still and moving cameras over textures, and cuts.

    python benchmarks/encoder_motion.py [--videos FILE ...] [--seed 0] [--json FILE]

Clips of 8 frames are rendered: a texture under a camera that stands or pans, or a cut to another
texture inside a window. nano's trained encoder sees each in full and with skip_ratio, and what is
printed of frames with a counterpart is

- apart: mean squared distance to the counterpart in front of the first block, as a share of what
  two frames that have nothing in common are apart (what `dycoke.vision.skip.CUT` is held against);
- error: RMS error of the computed cells' features, as a share of their RMS distance to the
  counterpart's;
- agreement: share of the cells that the paper's rule would keep, by the features of the full
  encoder, which skipping computes (by chance it is 1 - skip_ratio).

With --videos the frames of those files (8 in a second) are measured, too, and cuts from each to the
next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dycoke import DyCoke
from dycoke.assistant import Assistant
from dycoke.merging import counterparts, merge_mask
from dycoke.nano.build import TOKENS_PER_FRAME
from dycoke.nano.stories import SIZE
from dycoke.video import read
from dycoke.vision import skip

FRAMES, WINDOW = 8, 4
WAVELENGTHS = {"fine": (3, 8), "middle": (8, 24), "coarse": (24, 96)}  # pixels
STRENGTH = {"weak": 8, "strong": 40}  # grey levels
SPEEDS = (0, 0.5, 1, 2, 4, 8)  # pixels a frame; a cell is 8 x 8


def texture(rng: np.random.Generator, kind: str, strength: str, shift: float) -> NDArray[np.uint8]:
    """Plane waves under a camera that moves ``shift`` pixels a frame: uint8, (F, H, W, 3)."""
    low, high = WAVELENGTHS[kind]
    waves = 12
    number = 2 * np.pi / np.exp(rng.uniform(np.log(low), np.log(high), waves))
    angle, phase = rng.uniform(0, 2 * np.pi, (2, waves))
    way = rng.uniform(0, 2 * np.pi)
    amount = rng.uniform(0.5, 1, (waves, 3)) * STRENGTH[strength] / np.sqrt(waves)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    frames = []
    for frame in range(FRAMES):
        u, v = x + shift * frame * np.cos(way), y + shift * frame * np.sin(way)
        field = np.cos(
            number * (np.cos(angle) * u[..., None] + np.sin(angle) * v[..., None]) + phase
        )
        frames.append(field @ amount)
    picture = 110 + np.stack(frames) + rng.normal(0, 5, (FRAMES, SIZE, SIZE, 1))
    return picture.clip(0, 255).astype(np.uint8)


def rendered(seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Names and clips: pans over textures, and cuts at the second and third frame of a window."""
    rng = np.random.default_rng(seed)
    for strength in STRENGTH:
        for kind in WAVELENGTHS:
            for speed in SPEEDS:
                name = f"{strength} {kind} texture, {speed:g} px a frame"
                yield name, texture(rng, kind, strength, speed)
            one, two = (texture(rng, kind, strength, 0) for _ in range(2))
            for at in (1, 2):
                cut = np.concatenate([one[: WINDOW + at], two[WINDOW + at :]])
                yield f"{strength} {kind} texture, cut", cut


def filmed(path: str) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The name of a file, and its frames, 8 in a second, at nano's size, 8 at a time."""
    video = read(path, 10_000)
    step = max(1, round(video.fps / 8))
    frames = torch.from_numpy(video.frames[::step]).permute(0, 3, 1, 2).float()
    small = functional.interpolate(frames, (SIZE, SIZE), mode="bilinear", antialias=True)
    clip = small.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for start in range(0, len(clip) - FRAMES + 1, FRAMES):
        yield Path(path).name, clip[start : start + FRAMES]


class Encoder:
    """nano's encoder, in full and with cells left out."""

    def __init__(self, ratio: float) -> None:
        self.assistant = Assistant.load(device="cpu")
        self.model: Any = self.assistant.model
        self.compressor = DyCoke(merge_ratio=max(0.7, ratio), skip_ratio=ratio, skip_layer=0)

    @torch.inference_mode()
    def measure(self, clip: NDArray[np.uint8]) -> list[dict[str, float]]:
        """One row for each frame that has a counterpart."""
        pixels = self.assistant.processor.video_processor([clip], return_tensors="pt")
        pixels = pixels["pixel_values_videos"]
        states: list[Tensor] = []
        tower = self.model.model.vision_tower
        hook = tower.encoder.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: states.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        full = self._features(pixels)[0]
        hook.remove()
        with self.compressor(self.model):
            made, output = self._features(pixels)
        (computed,) = output.encoded[0]
        counterpart = counterparts(FRAMES, WINDOW)
        apart = (states[0] - states[0][counterpart]).square().sum(-1).mean(1)
        spread = (states[0] - states[0].mean(1, keepdim=True)).square().sum(-1).mean(1)
        wanted = merge_mask(full, self.compressor.skip_ratio, WINDOW)
        rows = []
        for frame, other in enumerate(counterpart.tolist()):
            if frame == other:
                continue
            keep = computed[frame]
            error = (made - full)[frame, keep].square().mean().sqrt()
            scale = (full[frame] - full[other])[keep].square().mean().sqrt()
            rows.append(
                {
                    "apart": float(apart[frame] / (spread[frame] + spread[other])),
                    "error": float(error / scale),
                    "agreement": float((wanted & computed)[frame].sum() / wanted[frame].sum()),
                    "encoded": float(keep.float().mean()),
                }
            )
        return rows

    def _features(self, pixels: Tensor) -> tuple[Tensor, Any]:
        output = self.model.model.get_video_features(pixels, return_dict=True)
        features = output.pooler_output[0][: FRAMES * TOKENS_PER_FRAME]  # some have a newline, too
        return features.view(FRAMES, TOKENS_PER_FRAME, -1), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=6, help="of each kind")
    parser.add_argument("--skip-ratio", type=float, default=0.7)
    parser.add_argument("--cut", type=float, default=skip.CUT, help="instead of CUT")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    skip.CUT = args.cut
    encoder = Encoder(args.skip_ratio)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seed, args.seed + args.clips):
        for name, clip in rendered(seed):
            rows = encoder.measure(clip)
            table.setdefault(name, []).extend(rows[3:5] if name.endswith("cut") else rows)
    films = [list(filmed(path)) for path in args.videos]
    for film, after in zip(films, films[1:] + films[:1], strict=True):
        for name, clip in film:
            table.setdefault(name, []).extend(encoder.measure(clip))
        for (_, one), (_, two) in zip(film, after, strict=False):
            cut = np.concatenate([one[: WINDOW + 1], two[WINDOW + 1 :]])
            table.setdefault("cut between films", []).extend(encoder.measure(cut)[3:5])
    columns = ("apart", "error", "agreement", "encoded")
    print(f"{'':42}" + "".join(f"{column:>11}" for column in columns))
    results = {}
    for name, rows in table.items():
        results[name] = {column: median(row[column] for row in rows) for column in columns}
        print(f"{name:42}" + "".join(f"{results[name][column]:11.2f}" for column in columns))
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "cut": args.cut, **results}, indent=1))


if __name__ == "__main__":
    main()
