"""Train nano from nothing: ``python -m dycoke.nano.train --out DIR --minutes M``.

A curriculum, because whole stories alone are learned slowly: first the vision tower and the
projector learn to see, on single frames and with a head that is thrown away; then the language
model learns to tell one event of 4 frames, two of 8, and at last up to four of 16. A stage ends
when its held-out accuracy is reached. Nothing is ever dropped from the input: the methods of this
library are judged on nano, and they are training-free.

Run it again with the same ``--out`` to go on from the last checkpoint. The folder then holds
``checkpoint.pt``, the learning curve ``curve.jsonl`` (one line per report) and ``model/``, the
newest model in its normal on-disk format.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, LlavaOnevisionForConditionalGeneration

from dycoke.compat import chat_prompt
from dycoke.nano import stories
from dycoke.nano.build import PATCH, SIDE, TOKENS_PER_FRAME, build_model, build_processor, save

CELL = 2 * PATCH  # side of what one visual token covers, in pixels
ROWS = SIDE // 2  # visual tokens per side of a frame
VALIDATION = 1_000_000  # first held-out seed used here; the benchmark starts at 0


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    ``events`` is the range drawn from, ``paces`` the clips' lengths: (frames, hold) with each
    frame shown ``hold`` times, as in footage of a lower frame rate; one pace per step, and the
    first is the one that is judged. ``asked``: the most questions per story beside the telling,
    ``enough`` the accuracy (of questions and of events) that ends it, ``share`` the largest part
    of the whole time that it may take. ``sees``: whether the vision tower still learns.
    """

    name: str
    events: tuple[int, int]
    paces: tuple[tuple[int, int], ...]
    batch: int
    asked: int
    enough: float
    share: float
    sees: bool


# A motion looks the same at any frame rate: in the last stage frames come at several, held ones
# included, so that the model compares a frame not only with the very last one.
PACES = ((24, 1), (12, 1), (8, 2), (16, 1), (12, 2), (12, 1), (24, 1), (8, 2))
STAGES = (
    Stage("sight", (4, 4), ((12, 1),), 8, 0, 0.97, 0.08, sees=True),
    Stage("one", (1, 1), ((4, 1),), 16, 4, 0.85, 0.2, sees=True),
    Stage("two", (1, 2), ((8, 1),), 12, 6, 0.85, 0.2, sees=True),
    Stage("all", (1, 4), ((16, 1),), 8, 8, 0.85, 0.25, sees=False),
    Stage("pace", (1, 4), PACES, 8, 8, 2.0, 1.0, sees=False),
)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain attention, (B, H, S, D) to (B, S, H, D), in the number format of its inputs.

    On CPUs a training step spends most of its time in the fused kernel; two matrix products in
    bfloat16, with the keys after each block of queries left out, take half as long. Same result.
    """
    if attention_mask is None:
        return (torch.softmax(query @ key.mT * scaling, -1) @ value).transpose(1, 2), None
    blocks = []
    for a in range(0, query.shape[2], 144):
        b = min(a + 144, query.shape[2])
        scores = query[:, :, a:b] * scaling @ key[:, :, :b].mT + attention_mask[:, :, a:b, :b]
        blocks.append(torch.softmax(scores, -1) @ value[:, :, :b])
    return torch.cat(blocks, 2).transpose(1, 2), None


AttentionInterface.register("nano_training", attention)


@dataclass
class Progress:
    """How far a run is; part of its checkpoint. The ``stage_`` fields: when the stage began."""

    stage: int = 0
    step: int = 0
    stories: int = 0
    seconds: float = 0.0
    stage_step: int = 0
    stage_seconds: float = 0.0


class Reader:
    """Turns stories into model inputs, with the video read once for all its questions."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.end = tokenizer.eos_token_id

    def words(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def pixels(self, told: list[stories.Story], hold: int = 1) -> Tensor:
        """What the processor makes of the frames: (B, F, 3, H, W) in -1 .. 1."""
        clips = torch.from_numpy(np.stack([stories.render(s) for s in told])).to(self.device)
        pixels = clips.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        return pixels.repeat_interleave(hold, dim=1)

    def batch(
        self, told: list[stories.Story], asked: int, rng: np.random.Generator, hold: int = 1
    ) -> dict[str, Tensor]:
        """Prompts as the chat template writes them, several per story behind one video.

        Each question with its answer sees the video and itself, and takes the positions that it
        would have alone, so that this equals one sequence per question.
        """
        frames = told[0].frames * hold
        prefix = self.words("<|im_start|>user " + "<video>" * (frames * TOKENS_PER_FRAME + 1))
        start = len(prefix)
        rows = []
        for story in told:
            pairs = stories.questions(story)
            order = rng.permutation(len(pairs))[:asked]
            prompt = stories.DESCRIBE[rng.integers(len(stories.DESCRIBE))]
            ids, labels, places = list(prefix), [-100] * start, list(range(start))
            segments = [0] * start
            for i, (question, answer) in enumerate(
                [(prompt, stories.describe(story)), *(pairs[j] for j in order)], 1
            ):
                before = self.words(f"{question}<|im_end|><|im_start|>assistant")
                after = [*self.words(answer), self.end]
                ids += before + after
                labels += [-100] * len(before) + after
                places += range(start, start + len(before) + len(after))
                segments += [i] * (len(before) + len(after))
            rows.append((ids, labels, places, segments))
        width = max(len(row[0]) for row in rows)

        def padded(column: int, fill: int) -> Tensor:
            lines = [row[column] + [fill] * (width - len(row[column])) for row in rows]
            return torch.tensor(lines, device=self.device)

        segment = padded(3, -1)
        same = segment[:, None] == segment[:, :, None]  # (B, query, key)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        seen = causal & (same | (segment == 0)[:, None])
        return {
            "input_ids": padded(0, self.tokenizer.pad_token_id),
            "labels": padded(1, -100),
            "position_ids": padded(2, 0),
            "attention_mask": torch.zeros(
                seen.shape, dtype=torch.bfloat16, device=self.device
            ).masked_fill_(~seen, -3e4)[:, None],
            "pixel_values_videos": self.pixels(told, hold),
        }


def sight_targets(told: list[stories.Story]) -> tuple[Tensor, Tensor]:
    """What each visual token shows: kind (B*F*N, 2) and place (B*F*N, 3).

    Kind is colour and shape, 0 for none; place is the offset of the shape's centre from the
    token's and its radius, in tokens. The topmost shape within reach counts.
    """
    middle = (np.arange(ROWS) + 0.5) * CELL
    kinds, places = [], []
    for story in told:
        kind = np.zeros((story.frames, ROWS, ROWS, 2), np.int64)
        place = np.zeros((story.frames, ROWS, ROWS, 3), np.float32)
        for sprite in stories.tracks(story):
            dx, dy = np.broadcast_arrays(
                (sprite.x[:, None] - middle)[:, None], (sprite.y[:, None] - middle)[..., None]
            )
            radius = np.broadcast_to(sprite.radius[:, None, None], dx.shape)
            f, r, c = np.nonzero(dx**2 + dy**2 < (radius + 3) ** 2)
            names = stories.COLOURS.index(sprite.colour), stories.SHAPES.index(sprite.shape)
            kind[sprite.frames[f], r, c] = np.array(names) + 1
            place[sprite.frames[f], r, c] = np.stack([dx, dy, radius], -1)[f, r, c] / CELL
        kinds.append(kind)
        places.append(place)
    return (
        torch.from_numpy(np.stack(kinds)).flatten(0, 3),
        torch.from_numpy(np.stack(places)).flatten(0, 3),
    )


class Trainer:
    """The state of a run, and what one step of each kind does to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        self.device = torch.device(args.device)
        self.processor = build_processor()
        self.model = build_model(self.processor.tokenizer, args.seed).to(self.device)
        self.reader = Reader(self.processor.tokenizer, self.device)
        torch.manual_seed(args.seed)
        colours, shapes = len(stories.COLOURS) + 1, len(stories.SHAPES) + 1
        self.split = [colours, shapes, 3]
        self.head = nn.Linear(self.model.config.text_config.hidden_size, sum(self.split))
        self.head.to(self.device)
        self.optimisers = self._optimisers()
        self.done = Progress()
        if (self.out / "checkpoint.pt").is_file():
            self._load()

    @property
    def stage(self) -> Stage:
        return STAGES[self.done.stage]

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, AdamW for everything else."""
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"training nano needs torch 2.9 or newer, this is {torch.__version__}"
            )
        matrices, others, steady = [], [], []
        for name, weight in [*self.model.named_parameters(), *self.head.named_parameters()]:
            if ".layers." in name and weight.ndim == 2:
                matrices.append(weight)
            elif weight.ndim == 2 and "embed" not in name:
                others.append(weight)
            else:
                steady.append(weight)
        muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.05}, {"params": steady, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )
        return [muon, adam]

    def _load(self) -> None:
        saved = torch.load(self.out / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.head.load_state_dict(saved["head"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.done = Progress(**saved["state"])

    def save(self) -> None:
        """Write checkpoint and model; a run stopped at any moment leaves a whole one behind."""
        self.out.mkdir(parents=True, exist_ok=True)
        new = self.out / "checkpoint.new"
        torch.save(
            {
                "model": self.model.state_dict(),
                "head": self.head.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "state": asdict(self.done),
            },
            new,
        )
        os.replace(new, self.out / "checkpoint.pt")
        self.model.set_attn_implementation("sdpa")
        twin = build_model(self.processor.tokenizer)
        twin.load_state_dict(self.model.state_dict())
        save(twin, self.processor, self.out / "model")

    def log(self, **line: Any) -> None:
        done = asdict(self.done) | {"stage": self.stage.name}
        line = {k: v for k, v in done.items() if not k.startswith("stage_")} | line
        line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(line), flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "curve.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def draw(
        self, split: stories.Split, first: int, count: int, frames: int | None = None
    ) -> list[stories.Story]:
        """Stories of the current stage, of its first pace unless ``frames`` are given."""
        frames = frames or self.stage.paces[0][0]
        low, high = self.stage.events
        high = min(high, frames // stories.SHORTEST)
        return [
            stories.make(split, seed, events=low + seed % (high - low + 1), frames=frames)
            for seed in range(first, first + count)
        ]

    def set_rate(self) -> None:
        """Warm up at the start of each stage; in the last part go down to nothing."""
        warm = min(1.0, (self.done.step - self.done.stage_step + 1) / 30)
        left = 1 - self.done.seconds / (60 * self.args.minutes)
        factor = warm * max(0.01, min(1.0, left / self.args.decay))
        for optimiser, times in zip(self.optimisers, (2, 1), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = times * self.args.rate * factor

    def step(self) -> float:
        """One step of the current stage; its loss."""
        frames, hold = self.stage.paces[self.done.step % len(self.stage.paces)]
        told = self.draw("train", self.done.stories, self.stage.batch, frames)
        self.model.train()
        self.model.set_attn_implementation("nano_training")
        self.model.model.vision_tower.requires_grad_(self.stage.sees)
        self.set_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.args.float32):
            loss = (
                self._sight(self._features(told), told)
                if self.stage.name == "sight"
                else self._tell(told, hold)
            )
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for o in self.optimisers for g in o.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.done.step += 1
        self.done.stories += self.stage.batch
        return float(loss.detach())

    def _features(self, told: list[stories.Story]) -> Tensor:
        """Visual tokens as the decoder gets them, without the newline: (B*F*N, D)."""
        pixels = self.reader.pixels(told)
        features: Tensor = self.model.model.get_video_features(pixels).pooler_output
        # transformers 5.18 and newer append the newline here, 5.17 does so later.
        whole = features.shape[1] - features.shape[1] % TOKENS_PER_FRAME
        return features[:, :whole].flatten(0, 1)

    def _name(self, features: Tensor) -> tuple[Tensor, ...]:
        """Colour, shape and place that the throw-away head reads from each visual token."""
        guess: Tensor = self.head(features).float()
        return torch.split(guess, self.split, -1)

    def _sight(self, features: Tensor, told: list[stories.Story]) -> Tensor:
        """Loss of the throw-away head."""
        colour, shape, where = self._name(features)
        kind, place = (target.to(self.device) for target in sight_targets(told))
        something = (kind[:, :1] > 0).float()
        weight = something[:, 0] + 0.2  # most tokens show nothing
        named = functional.cross_entropy(colour, kind[:, 0], reduction="none")
        named = named + functional.cross_entropy(shape, kind[:, 1], reduction="none")
        placed = functional.smooth_l1_loss(where, place, reduction="none") * something
        return ((named + 2 * placed.sum(-1)) * weight).sum() / weight.sum()

    def _tell(self, told: list[stories.Story], hold: int) -> Tensor:
        """Loss of the answers, and of the head for as long as the vision tower learns."""
        rng = np.random.default_rng([self.args.seed, self.done.stories])
        inputs = self.reader.batch(told, self.stage.asked, rng, hold)
        labels = inputs.pop("labels")
        seen: list[Tensor] = []
        projector = self.model.model.multi_modal_projector
        hook = projector.register_forward_hook(lambda module, given, made: seen.append(made))
        output = self.model.model(**inputs, use_cache=False, output_hidden_states=True)
        hook.remove()
        answer = labels[:, 1:] != -100
        truth = labels[:, 1:][answer]

        def miss(hidden: Tensor) -> Tensor:
            logits: Tensor = self.model.lm_head(hidden[:, :-1][answer])
            return functional.cross_entropy(logits.float(), truth)

        loss = miss(output.last_hidden_state)
        # Deep supervision: every layer is asked for the answer, so that the first ones already
        # learn where to look. The eighth of eight layers is the one that counts.
        norm = self.model.model.language_model.norm
        below = [miss(norm(hidden)) for hidden in output.hidden_states[1:-1]]
        loss = loss + 0.3 * torch.stack(below).mean()
        if self.stage.sees:
            pooled = self.model.model.apply_pooling(seen[0]).flatten(0, 1)
            loss = loss + 0.3 * self._sight(pooled, told)
        return loss

    @torch.no_grad()
    def validate(self, count: int) -> dict[str, float]:
        """Accuracy on held-out stories of the current stage; `count` of them."""
        told = self.draw("seen", VALIDATION, count)
        self.model.eval()
        self.model.set_attn_implementation("sdpa")
        if self.stage.name == "sight":
            kind, place = (target.to(self.device) for target in sight_targets(told))
            colour, shape, where = self._name(self._features(told))
            something = kind[:, 0] > 0
            off = (where - place)[something][:, :2].norm(dim=-1).mean() * CELL
            found = (colour.argmax(-1) > 0) == something
            right = [
                (guess.argmax(-1) == true)[something].float().mean().item()
                for guess, true in zip((colour, shape), kind.T, strict=True)
            ]
            return {
                "colour": right[0],
                "shape": right[1],
                "found": found.float().mean().item(),
                "off_pixels": off.item(),
                "ask": right[0],
                "events": right[1],
            }
        return evaluate(self.model, self.processor, told)

    def run(self) -> None:
        """Train until the time or the steps are used up."""
        losses: list[float] = []
        last = time.monotonic()

        def count() -> None:
            nonlocal last
            now = time.monotonic()
            # A process that was paused must not lose its time.
            self.done.seconds += min(now - last, 120)
            last = now

        next_report = self.done.seconds + self.args.every
        while self.done.seconds < 60 * self.args.minutes and (
            self.args.steps is None or self.done.step < self.args.steps
        ):
            losses.append(self.step())
            count()
            if self.done.seconds < next_report:
                continue
            score = self.validate(self.args.validate)
            self.log(loss=float(np.mean(losses)), **score)
            losses.clear()
            count()
            next_report = self.done.seconds + self.args.every
            self._maybe_next(min(score["ask"], score["events"]))
            self.save()
        self.save()

    def _maybe_next(self, score: float) -> None:
        spent = self.done.seconds - self.done.stage_seconds
        late = spent > 60 * self.args.minutes * self.stage.share
        if self.stage is STAGES[-1] or (score < self.stage.enough and not late):
            return
        if self.stage.name == "sight":
            self._settle_sight()
        self.done.stage += 1
        self.done.stage_step = self.done.step
        self.done.stage_seconds = self.done.seconds

    @torch.no_grad()
    def _settle_sight(self) -> None:
        """Bring the visual features to the size at which the decoder reads most easily."""
        features = self._features(self.draw("train", 0, 4))
        scale = 0.5 / features.square().mean().sqrt()
        last = self.model.model.multi_modal_projector.linear_2
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        self.head.weight.div_(scale)


@torch.no_grad()
def evaluate(
    model: LlavaOnevisionForConditionalGeneration,
    processor: Any,
    told: list[stories.Story],
    asked: int = 4,
    rows: int = 32,
    wrong: list[tuple[str, str]] | None = None,
) -> dict[str, float]:
    """Greedy answers of the plain model: share of questions and of events that are right.

    Parameters
    ----------
    told : list of Story
        All of the same number of frames.
    asked : int
        Questions per story, beside the telling.
    rows : int
        Prompts that are generated together.
    wrong : list, optional
        Receives (truth, answer) of everything that is not right.

    Returns
    -------
    dict
        "ask" and "events", 0 to 1, with "asked" and "told", their counts.
    """
    reader = Reader(processor.tokenizer, model.device)
    prompts: list[tuple[stories.Story, str, str | None]] = []
    for story in told:
        rng = np.random.default_rng([story.seed, 7])
        pairs = stories.questions(story)
        prompts.append((story, stories.DESCRIBE[0], None))
        prompts += [(story, *pairs[i]) for i in rng.permutation(len(pairs))[:asked]]

    right = {"ask": 0, "events": 0}
    asks = 0
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        texts = [chat_prompt(processor, question) for _, question, _ in part]
        count = part[0][0].frames * TOKENS_PER_FRAME + 1
        texts = [text.replace("<video>", "<video>" * count) for text in texts]
        tokens = processor.tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        unique = list(dict.fromkeys(story for story, _, _ in part))
        seen = dict(zip(unique, reader.pixels(unique), strict=True))
        pixels = torch.stack([seen[story] for story, _, _ in part])
        made = model.generate(
            **tokens, pixel_values_videos=pixels, max_new_tokens=64, do_sample=False
        )
        answers = processor.tokenizer.batch_decode(
            made[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for (story, question, truth), answer in zip(part, answers, strict=True):
            if truth is None:
                good = stories.events_right(answer, story)
                right["events"] += good
                all_right = good == len(story.events)
                truth = stories.describe(story)
            else:
                asks += 1
                all_right = stories.same_answer(answer, truth)
                right["ask"] += all_right
                truth = f"{question} {truth}"
            if wrong is not None and not all_right:
                wrong.append((truth, answer))
    events = sum(len(story.events) for story in told)
    return {
        "ask": right["ask"] / max(1, asks),
        "events": right["events"] / events,
        "asked": asks,
        "told": events,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dycoke.nano.train", description=__doc__)
    parser.add_argument("--out", required=True, help="folder of checkpoint, curve and model")
    parser.add_argument("--minutes", type=float, default=120, help="of training, over all runs")
    parser.add_argument("--steps", type=int, help="stop after this many, over all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="peak learning rate of AdamW; twice that for Muon"
    )
    parser.add_argument("--decay", type=float, default=0.25, help="last share of the time")
    parser.add_argument("--every", type=float, default=120, help="seconds between reports")
    parser.add_argument("--validate", type=int, default=32, help="held-out stories per report")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 arithmetic")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    Trainer(args).run()


if __name__ == "__main__":
    main()
