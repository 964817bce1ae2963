"""docs/methods.md line by line over an unmodified model: slow, naive, sharing no code with dycoke.

There is no KV cache. Every step runs the whole (shortened) sequence again through the model's own
layers, with an explicit mask per row: a generated token's row hides, from layers >= L, the visual
tokens that were not in the active set of its step.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass
class Margins:
    """How far every decision was from going the other way."""

    values: list[float] = field(default_factory=list)

    def gap(self, ordered: list[float], count: int) -> None:
        if 0 < count < len(ordered):
            self.values.append(ordered[count - 1] - ordered[count])

    @property
    def least(self) -> float:
        return min(self.values, default=math.inf)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def merge_one_video(
    features: Tensor, ratio: float, window: int, margins: Margins
) -> tuple[list[list[bool]], list[list[tuple[int, int]]]]:
    """(F, N, D) -> keep[f][n], and for every token the place (f, n) that stands for it."""
    frames, tokens, _ = features.shape
    features = features.float()
    keep = [[True] * tokens for _ in range(frames)]
    into = [[(f, n) for n in range(tokens)] for f in range(frames)]
    stay = int((1 - ratio) * tokens + 1e-6)
    for start in range(0, frames, window):
        for j in range(1, min(window, frames - start)):
            other = start + (j - 1 if j % 2 else 0)
            frame = start + j
            similar = [cosine(features[frame, n], features[other, n]) for n in range(tokens)]
            ranked = sorted(range(tokens), key=lambda n: (-similar[n], n))
            margins.gap([similar[n] for n in ranked], tokens - stay)
            for n in ranked[: tokens - stay]:
                keep[frame][n] = False
                into[frame][n] = (other, n)
    return keep, into


def keep_of_budget(
    features: Tensor, count: int, window: int, margins: Margins
) -> tuple[list[list[bool]], list[list[tuple[int, int]]]]:
    """The same for a budget of ``count`` tokens: what says most stays, the first frame first."""
    frames, tokens, _ = features.shape
    features = features.float()
    unit = features / features.norm(dim=-1, keepdim=True)
    keep = [[False] * tokens for _ in range(frames)]
    into = [[(f, n) for n in range(tokens)] for f in range(frames)]
    value: dict[tuple[int, int], float] = {}
    alone: list[float] = []
    for f in range(frames):
        place = f % window
        other = f - window if place == 0 else f - 1 if place % 2 else f - place
        for n in range(tokens):
            into[f][n] = (max(other, 0), n)
            like = cosine(unit[f, n], unit[other, n] if f else unit[0].mean(0))
            if f == 0:
                alone.append(like)
            value[f, n] = 2 - like - cosine(unit[f, n], unit[:, n].mean(0))
    ranked = sorted(range(tokens), key=lambda n: (alone[n], n))
    certain = min(tokens, max(1, count // 4))
    margins.gap([-alone[n] for n in ranked], certain)
    for n in ranked[:certain]:
        keep[0][n] = True
    best = [sorted(range(tokens), key=lambda n: (-value[f, n], n)) for f in range(frames)]
    left = (count + 2) // 4
    for number in range(tokens):
        turn = sorted(((f, best[f][number]) for f in range(frames)), key=lambda s: (-value[s], s))
        margins.gap([value[spot] for spot in turn], left)
        for f, n in turn[: max(0, left)]:
            margins.gap([value[f, m] for m in best[f]], number + 1)
            keep[f][n] = True
        left -= frames
    rest = [spot for spot in value if not keep[spot[0]][spot[1]]]
    rest.sort(key=lambda spot: (-value[spot], spot))
    more = count - (frames * tokens - len(rest))
    margins.gap([value[spot] for spot in rest], more)
    for f, n in rest[:more]:
        keep[f][n] = True
    for f in range(frames):
        for n in range(tokens):
            if keep[f][n]:
                into[f][n] = (f, n)
    return keep, into


def mean_of_merged(
    features: Tensor, keep: list[list[bool]], into: list[list[tuple[int, int]]]
) -> Tensor:
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for f, row in enumerate(keep):
        for n in range(len(row)):
            place = (f, n)
            while into[place[0]][place[1]] != place:
                place = into[place[0]][place[1]]
            groups.setdefault(place, []).append(features[f, n].float())
    result = features.clone()
    for (f, n), members in groups.items():
        result[f, n] = torch.stack(members).mean(0).to(features.dtype)
    return result


@dataclass
class Row:
    """One token of the shortened sequence."""

    embedding: Tensor
    position: Tensor  # scalar, or (3,) for 3-D RoPE
    visual: bool
    deep: list[Tensor] = field(default_factory=list)  # what the first layers add (deepstack)
    told: Tensor | None = None  # what each layer is told of the token's id, (layers, D)
    block: int = -1  # rows of a block see each other in layers with a window
    hidden: set[int] = field(default_factory=set)  # rows that layers >= L must not see


@dataclass
class Answer:
    ids: list[int]
    logits: list[Tensor]
    margins: Margins
    keep: list[list[list[bool]]]
    active: list[set[int]]
    refreshes: int
    recalled: int
    kept_rows: int


@lru_cache(maxsize=8)
def _eager(model: Any) -> Any:
    """A copy with plain attention; oracles change nothing in it and may share it."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


class Oracle:
    """Greedy generation for one sample (no batch, no padding), one or more turns."""

    def __init__(self, model: Any, family: str, *, K: float, P: float, L: int, **options: Any):
        self.model = _eager(model)
        self.family = family
        self.spatial = family.startswith(("qwen", "glm"))  # 3-D positions
        self.K, self.P, self.L = K, P, L
        self.window = options.get("window", 4)
        self.threshold = options.get("threshold", 0.9)
        self.mean = options.get("mean", False)
        self.compact = options.get("compact", False)
        self.budget = options.get("budget")  # an int: tokens of one video; a float: a share
        self.videos = options.get("videos", ())  # images in each video; () for one video
        self.rows: list[Row] = []
        self.margins = Margins()
        self.keep: list[list[list[bool]]] = []
        self.deepstack: list[Tensor] = []  # per decoder layer, (video tokens of the prompt, D)
        self.config = config = model.config.get_text_config()
        self.kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(
            self._layers()
        )
        full = [i for i, kind in enumerate(self.kinds) if kind == "full_attention"]
        below = [i for i in full if i < L]
        self.scoring = below[-1] if below else full[0]
        # Layers without keys of their own read those of the last one that has some.
        own = [i for i in full if not getattr(self._layers()[i].self_attn, "is_kv_shared_layer", 0)]
        self.pruned = [i for i in full if min(i, own[-1]) >= L and min(i, own[-1]) > self.scoring]
        # (layer, choose, mix): choose(attention of visual rows) -> those that go on; mix(their
        # states, those) -> states to go on with.
        self.drop = options.get("drop")
        self.gone: set[int] = set()
        if self.drop:
            self.scoring = self.drop[0] - 1
            self.pruned = list(range(self.drop[0], len(self.kinds)))

    def _layers(self) -> Any:
        return self.model.get_decoder().layers

    # The prompt

    @torch.no_grad()
    def prompt(self, inputs: dict[str, Tensor], tokens_per_frame: int, video_token: int) -> None:
        core = self.model.model
        ids = inputs["input_ids"][0]
        self.length = len(ids)
        places = [i for i, token in enumerate(ids.tolist()) if token == video_token]
        embeds = core.get_input_embeddings()(self._known(ids))
        features, positions, self.next_position = self._encode(core, inputs)
        deep = dict(zip(places, zip(*self.deepstack, strict=True), strict=False))
        embeds[places] = torch.cat(features).to(embeds.dtype)

        stays = [True] * len(ids)
        visual = [False] * len(ids)
        cursor = 0
        for video in features:
            frames = len(video) // tokens_per_frame
            spots = places[cursor : cursor + frames * tokens_per_frame]
            cursor += len(video)
            x = embeds[spots].view(frames, tokens_per_frame, -1)
            if self.budget is None:
                keep, into = merge_one_video(x, self.K, self.window, self.margins)
            else:
                count = self.budget
                if isinstance(count, float):
                    count = max(1, int(count * len(spots) + 1e-6))
                keep, into = keep_of_budget(x, count, self.window, self.margins)
            self.keep.append(keep)
            if self.mean:
                embeds[spots] = mean_of_merged(x, keep, into).view(len(spots), -1)
            for spot, stay in zip(spots, [k for row in keep for k in row], strict=True):
                visual[spot], stays[spot] = stay, stay
        index = [i for i in range(len(ids)) if stays[i]]
        for number, i in enumerate(index):
            position = torch.tensor(number) if self.compact else positions[..., i]
            row = Row(embeds[i], position, visual[i], list(deep.get(i, ())), self._told(ids[i]))
            if getattr(self.config, "use_bidirectional_attention", None) and i in places:
                row.block = sum(a not in places for a in range(i))  # runs of placeholders
            self.rows.append(row)
        if self.compact:
            self.next_position = len(index)
        self.kept_rows = len(index)

    def _encode(self, core: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, int]:
        """Features per video as scattered, positions of the whole prompt, the next position."""
        length = inputs["input_ids"].shape[1]
        if "pixel_values" in inputs:
            images = core.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
            images = torch.cat([image.reshape(-1, image.shape[-1]) for image in images])
            rows = [frames * 9 for frames in self.videos] or [len(images)]
            return list(images.split(rows)), torch.arange(length), length
        pixels = inputs["pixel_values_videos"]
        if self.family.startswith("llava"):
            rows = core.get_video_features(pixels, return_dict=True).pooler_output
            rows = [video.reshape(-1, video.shape[-1]) for video in rows]
            features = [video[: len(video) // 9 * 9] for video in rows]
            if self.family == "llava_onevision":
                features = [torch.cat([video, core.image_newline[None]]) for video in features]
            return features, torch.arange(length), length
        if self.family == "gemma4":
            names = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
            given = {name: inputs[name] for name in names if name in inputs}
            rows = core.get_video_features(**given, return_dict=True).pooler_output
            return list(rows), torch.arange(length), length
        grid = inputs["video_grid_thw"]
        if self.family == "video_llama_3":
            rows = core.get_video_features(
                pixels, grid, inputs["video_merge_sizes"], return_dict=True
            )
            return list(rows.pooler_output), torch.arange(length), length
        encoded = core.get_video_features(pixels, grid, return_dict=True)
        features = list(encoded.pooler_output)
        for layer in getattr(encoded, "deepstack_features", ()):
            # The floor gives a tensor where newer versions give one per video.
            self.deepstack.append(layer if isinstance(layer, Tensor) else torch.cat(list(layer)))
        positions, delta = core.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            video_grid_thw=grid,
        )
        # generate counts on from the last position while it decodes, and by `delta` in a new turn.
        self.delta = int(delta)
        return features, positions[:, 0], int(positions[0, 0, -1]) + 1

    def text(self, tokens: list[int]) -> None:
        """A new turn's tokens: they attend to everything."""
        if self.spatial:
            self.next_position = self.length + self.delta
        for token in tokens:
            self._append(token)

    @torch.no_grad()
    def _append(self, token: int) -> None:
        embedding = self.model.model.get_input_embeddings()(self._known(torch.tensor(token)))
        told = self._told(torch.tensor(token))
        self.rows.append(Row(embedding, self._advance(), False, told=told))

    def _known(self, ids: Tensor) -> Tensor:
        """Gemma 4 embeds every placeholder as padding, a generated one, too."""
        if self.family != "gemma4":
            return ids
        config = self.model.config
        placeholders = (config.image_token_id, config.video_token_id, config.audio_token_id)
        return torch.where(torch.isin(ids, torch.tensor(placeholders)), 0, ids)

    def _told(self, token: Tensor) -> Tensor | None:
        if not getattr(self.config, "hidden_size_per_layer_input", 0):
            return None
        decoder = self.model.model.language_model
        return decoder.get_per_layer_inputs(self._known(token).view(1, 1), None)[0, 0]

    def _advance(self) -> Tensor:
        position = torch.tensor(self.next_position)
        self.next_position += 1
        self.length += 1
        return position.repeat(3) if self.spatial else position

    # The model, with a mask per layer

    @torch.no_grad()
    def forward(self, choose: Any) -> Tensor:
        """Logits of the last row. ``choose`` gets its attention in layer L-1, before layer L."""
        decoder = self.model.get_decoder()
        hidden = torch.stack([row.embedding for row in self.rows])[None]
        positions = torch.stack([row.position for row in self.rows], -1)
        positions = positions[:, None] if positions.ndim == 2 else positions[None]
        seen: list[Tensor] = []
        extra: dict[str, Any] = {}
        if self.family == "gemma4":
            extra["shared_kv_states"] = {}
            told = torch.stack([row.told for row in self.rows])[None]
            told = decoder.project_per_layer_inputs(hidden, told)
        with self._watch_routers():
            for i, layer in enumerate(decoder.layers):
                kind = self.kinds[i]
                if self.family == "gemma4":
                    extra["per_layer_input"] = told[:, :, i]
                    rotary = decoder.rotary_emb(hidden, positions, kind)
                elif i == 0:
                    rotary = decoder.rotary_emb(hidden, positions)
                if self.drop and i == self.drop[0] and self.drop[2]:
                    visual = [j for j, row in enumerate(self.rows) if row.visual]
                    left = [v for v, j in enumerate(visual) if j not in self.gone]
                    hidden[0, visual] = self.drop[2](hidden[0, visual], left)
                if i == self.scoring:
                    hook = layer.self_attn.register_forward_hook(
                        lambda m, a, out: seen.append(out[1][0, :, -1].mean(0))
                    )
                mask = self._mask(hidden, kind, i in self.pruned)
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **extra)
                if i == self.scoring:
                    hook.remove()
                    if choose is not None:
                        choose(seen[0])
                for j, row in enumerate(self.rows):
                    if i < len(row.deep):
                        hidden[0, j] += row.deep[i]
        return self.model.lm_head(decoder.norm(hidden))[0, -1]

    @contextlib.contextmanager
    def _watch_routers(self) -> Iterator[None]:
        """Which experts a token goes to is a decision, too."""

        def watch(router: Any, args: Any, output: Any) -> None:
            ranked = output[0].softmax(-1).sort(-1, descending=True).values
            gaps = ranked[:, router.top_k - 1] - ranked[:, router.top_k]
            self.margins.values.append(float(gaps.min()))

        modules = self.model.get_decoder().modules()
        hooks = [m.register_forward_hook(watch) for m in modules if hasattr(m, "top_k")]
        yield
        for hook in hooks:
            hook.remove()

    def _mask(self, hidden: Tensor, kind: str, hide: bool) -> Tensor | None:
        if kind == "linear_attention":
            return None
        window = self.config.sliding_window if kind == "sliding_attention" else math.inf
        n = len(self.rows)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        unseen = j > i
        if window < n:
            block = torch.tensor([row.block for row in self.rows])
            unseen &= (block[i] != block[j]) | (block[j] < 0)
        unseen |= i - j >= window
        if hide:
            unseen[:, list(self.gone)] = True
            for number, row in enumerate(self.rows):
                if row.hidden:
                    unseen[number, list(row.hidden)] = True
        least = torch.finfo(hidden.dtype).min
        return torch.where(unseen, least, 0.0).to(hidden)[None, None]

    # Generation

    def generate(self, new_tokens: int) -> Answer:
        """One turn. The first token comes from a row that attends to everything."""
        visual = [i for i, row in enumerate(self.rows) if row.visual]
        count = int((1 - self.P) * len(visual) + 1e-6)
        ids: list[int] = []
        all_logits: list[Tensor] = []
        sets: list[set[int]] = []
        previous: Tensor | None = None
        active: set[int] = set()
        refreshes = recalled = 0

        def choose(attention: Tensor) -> None:
            nonlocal previous, active, refreshes, recalled
            a = attention[visual].double()
            if previous is not None:
                similarity = cosine(a, previous)
                self.margins.values.append(abs(similarity - self.threshold))
            if previous is None or similarity < self.threshold:
                ranked = sorted(range(len(visual)), key=lambda v: (-float(a[v]), v))
                self.margins.gap([float(a[v]) for v in ranked], count)
                chosen = {visual[v] for v in ranked[:count]}
                if previous is not None:
                    refreshes += 1
                    recalled += len(chosen - active)
                active = chosen
            previous = a
            sets.append(set(active))
            self.rows[-1].hidden = set(visual) - active

        def leave(attention: Tensor) -> None:
            a = attention[visual]
            left = self.drop[1](a)
            self.margins.gap(sorted(a.tolist(), reverse=True), len(left))
            self.gone = {j for v, j in enumerate(visual) if v not in left}

        for step in range(new_tokens):
            first = step == 0 and self.drop and not self.gone
            logits = self.forward(leave if first else choose if step and self.P > 0 else None)
            token = int(logits.argmax())
            self.margins.gap(logits.sort(descending=True).values.tolist(), 1)
            ids.append(token)
            all_logits.append(logits)
            if step + 1 == new_tokens:
                self.pending = token  # generated, but not fed yet
            else:
                self._append(token)
        return Answer(
            ids, all_logits, self.margins, self.keep, sets, refreshes, recalled, self.kept_rows
        )
