"""Echoes and a layer that scores later, against the naive oracle: a sequence with all tokens in it.

What was merged stands in front of the rows in every layer that has echoes. The model's own layer
runs over both, an explicit mask says who sees whom, and where an echo is guessed its result is
thrown away for the formula of docs/methods.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import oracle
import pytest
import tiny
import torch
from support import BACKENDS, answer, close, compressed, exact, generate, inputs_of, model_of
from test_parity import PADDED, PADDED_TEXT, alone, check, with_margin
from torch import Tensor

from dycoke import DyCoke, UnsupportedError
from dycoke.compat import cache_name, cache_of
from dycoke.core import echo as echoes_of_dycoke
from dycoke.methods import create

pytestmark = exact

FAMILIES = [
    "llava_onevision",  # 1-D
    "qwen2_5_vl",  # 3-D
    "qwen3_vl",  # deepstack, norms of heads
    "qwen3_5",  # linear layers between
    "glm4v",  # layers with more norms, partial rotary
    "internvl",  # frames are images
]
families = pytest.mark.parametrize("family", FAMILIES)


@dataclass
class Ghost:
    """A merged token: what it starts from, and who goes before and after it."""

    embedding: Tensor
    position: Tensor
    place: int  # in the whole prompt
    frame: int
    before: int  # rows
    after: int
    weight: float


class Oracle(oracle.Oracle):
    """`oracle.Oracle` with echoes in the first ``top`` layers, of which it computes ``exact``."""

    def __init__(self, *args: Any, top: int, exact: int, late: int | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reach = options.get("reach", 4)
        full = [i for i in range(top) if self.kinds[i] == "full_attention"]
        self.sees, self.computes, self.late = full, full[:exact], late
        self.ghosts: list[Ghost] = []
        self.places: list[int] = []  # of the prompt's rows
        self.frames: dict[int, int] = {}  # of the visual rows

    @torch.no_grad()
    def prompt(self, inputs: dict[str, Tensor], tokens_per_frame: int, video_token: int) -> None:
        super().prompt(inputs, tokens_per_frame, video_token)
        options = {"videos": self.videos, "window": self.window}
        whole = oracle.Oracle(self.model, self.family, K=0, P=0, L=self.L, **options)
        whole.prompt(inputs, tokens_per_frame, video_token)
        visual = iter([i for i, row in enumerate(whole.rows) if row.visual])
        spots, begun = {}, 0  # (video, frame, n) -> place
        gone, number = set(), {}
        for v, video in enumerate(self.keep):
            for f, row in enumerate(video):
                for n, kept in enumerate(row):
                    spots[v, f, n] = place = next(visual)
                    number[place] = begun + f
                    if not kept:
                        gone.add(place)
            begun += len(video)
        self.places = [i for i in range(len(whole.rows)) if i not in gone]
        row_of = {place: row for row, place in enumerate(self.places)}
        self.frames = {row_of[p]: f for p, f in number.items() if p not in gone}
        for (v, f, n), place in spots.items():
            if place not in gone:
                continue
            stay = [g for g in range(len(self.keep[v])) if self.keep[v][g][n]]
            earlier, later = [g for g in stay if g < f], [g for g in stay if g > f]
            if not stay:
                continue
            a = max(earlier) if earlier else min(later)
            b = min(later) if later else max(earlier)
            weight = (f - a) / (b - a) if earlier and later else 0.0
            rows = row_of[spots[v, a, n]], row_of[spots[v, b, n]]
            token = whole.rows[place]
            self.ghosts.append(
                Ghost(token.embedding, token.position, place, number[place], *rows, weight)
            )
        self.ghosts.sort(key=lambda ghost: ghost.place)

    def _guess(self, change: Tensor) -> Tensor:
        """What the rows' change (n, D) comes to for every ghost."""
        return torch.stack(
            [(1 - g.weight) * change[g.before] + g.weight * change[g.after] for g in self.ghosts]
        )

    def _with_ghosts(self, rows: Tensor) -> Tensor:
        """The mask of ghosts and rows from that of the rows, (n, n)."""
        e, n, least = len(self.ghosts), len(rows), float(rows.min())
        least = torch.finfo(rows.dtype).min if least == 0 else least
        mask = torch.full((e + n, e + n), least, dtype=rows.dtype)
        mask[e:, e:] = rows
        for i, ghost in enumerate(self.ghosts):
            for j, other in enumerate(self.ghosts):
                if other.place <= ghost.place and other.frame >= ghost.frame - self.reach:
                    mask[i, j] = 0.0
            for row, place in enumerate(self.places):
                if place < ghost.place:
                    mask[i, e + row] = 0.0
                near = row in self.frames and ghost.frame >= self.frames[row] - self.reach
                if near and ghost.place < place:
                    mask[e + row, i] = 0.0
        return mask

    @torch.no_grad()
    def forward(self, choose: Any) -> Tensor:
        decoder = self.model.get_decoder()
        hidden = torch.stack([row.embedding for row in self.rows])[None]
        states = torch.stack([g.embedding for g in self.ghosts]) if self.ghosts else hidden[0, :0]
        given = [g.position for g in self.ghosts] + [row.position for row in self.rows]
        positions = torch.stack(given, -1)
        positions = positions[:, None] if positions.ndim == 2 else positions[None]
        e, scoring = len(self.ghosts), self.scoring if self.late is None else self.late
        rotary = decoder.rotary_emb(hidden, positions)
        of_rows = tuple(part[:, e:] for part in rotary)
        seen: list[Tensor] = []

        def watched(layer: Any, mask: Tensor | None) -> Tensor:
            hook = layer.self_attn.register_forward_hook(
                lambda m, a, out: seen.append(out[1][0, :, -1, -len(self.rows) :].mean(0))
            )
            made = layer(hidden, attention_mask=mask, position_embeddings=of_rows)
            hook.remove()
            return made

        for i, layer in enumerate(decoder.layers):
            entered = hidden
            self.upper_half = self.late is not None and i > self.late
            mask = self._mask(hidden, self.kinds[i], i in self.pruned)
            both = e > 0 and i in self.sees
            if both:
                assert mask is not None
                made = layer(
                    torch.cat([states[None], hidden], 1),
                    attention_mask=self._with_ghosts(mask[0, 0])[None, None],
                    position_embeddings=rotary,
                )
                hidden, own = made[:, e:], made[0, :e]
            if i == scoring and choose is not None:
                # Over everything, whatever this layer attends to itself.
                plain, hidden_now = self._mask(entered, self.kinds[i], False), hidden
                hidden = entered
                if both:
                    assert plain is not None
                    hook = layer.self_attn.register_forward_hook(
                        lambda m, a, out: seen.append(out[1][0, :, -1, e:].mean(0))
                    )
                    layer(
                        torch.cat([states[None], hidden], 1),
                        attention_mask=self._with_ghosts(plain[0, 0])[None, None],
                        position_embeddings=rotary,
                    )
                    hook.remove()
                else:
                    watched(layer, plain)
                hidden = hidden_now
            if not both:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=of_rows)
            if both and i in self.computes:
                states, entered = own, hidden
            hidden = hidden.clone()
            for j, row in enumerate(self.rows):
                if i < len(row.deep):
                    hidden[0, j] += row.deep[i]
            if e and i < max(self.sees, default=-1):
                states = states + self._guess((hidden - entered)[0])
            if i == scoring and choose is not None:
                choose(seen[-1])
        return self.model.lm_head(decoder.norm(hidden))[0, -1]

    def _mask(self, hidden: Tensor, kind: str, hide: bool) -> Tensor | None:
        """Above a late scoring layer rows hide what the newer selection says."""
        for row in self.rows:
            if self.late is not None and hasattr(row, "sets"):
                row.hidden = row.sets[self.upper_half]
        return super()._mask(hidden, kind, hide)

    def generate(self, new_tokens: int) -> oracle.Answer:
        if self.late is None:
            return super().generate(new_tokens)
        visual = [i for i, row in enumerate(self.rows) if row.visual]
        count = int((1 - self.P) * len(visual) + 1e-6)
        state: dict[str, Any] = {"previous": None, "active": set(), "refreshes": 0, "recalled": 0}
        ids: list[int] = []
        all_logits: list[Tensor] = []
        sets: list[set[int]] = []

        def choose(attention: Tensor) -> None:
            a, previous = attention[visual].double(), state["previous"]
            before = state["active"]
            if previous is not None:
                similarity = oracle.cosine(a, previous)
                self.margins.values.append(abs(similarity - self.threshold))
            if previous is None or similarity < self.threshold:
                ranked = sorted(range(len(visual)), key=lambda v: (-float(a[v]), v))
                self.margins.gap([float(a[v]) for v in ranked], count)
                state["active"] = chosen = {visual[v] for v in ranked[:count]}
                if previous is not None:
                    state["refreshes"] += 1
                    state["recalled"] += len(chosen - before)
            state["previous"] = a
            if previous is not None:  # the prompt's last row attends to everything
                # Layers up to the scoring one go on with the step before; those above it follow.
                self.rows[-1].sets = (  # type: ignore[attr-defined]
                    set(visual) - before,
                    set(visual) - state["active"],
                )
                sets.append(set(state["active"]))

        for step in range(new_tokens):
            if step:
                # In force until this step has chosen, in the layers up to the scoring one.
                hidden = set(visual) - state["active"]
                self.rows[-1].sets = (hidden, hidden)  # type: ignore[attr-defined]
            logits = self.forward(choose if self.P > 0 else None)
            token = int(logits.argmax())
            self.margins.gap(logits.sort(descending=True).values.tolist(), 1)
            ids.append(token)
            all_logits.append(logits)
            if step + 1 < new_tokens:
                self._append(token)
        return oracle.Answer(
            ids,
            all_logits,
            self.margins,
            self.keep,
            sets,
            state["refreshes"],
            state["recalled"],
            self.kept_rows,
        )


# Share of five layers, exact ones, and the layer that scores.
SETTINGS = {
    "guessed": (0.6, 0, None),
    "one exact": (0.6, 1, None),
    "two exact": (0.8, 2, None),
    "late": (0.0, 0, 3),
    "late of all": (0.0, 0, 4),
    "both": (0.6, 1, 3),
    "everywhere": (1.0, 1, 3),
}
TOKENS = 5


def settings_of(name: str, K: float = 0.7, P: float = 0.7, L: int = 2, **more: Any) -> DyCoke:
    share, exact_layers, late = SETTINGS[name]
    values = {"echo": share, "echo_exact": exact_layers, "score_layer": late, **more}
    return DyCoke(merge_ratio=K, prune_ratio=P, prune_layer=L, refresh_threshold=1, **values)


def ask(model: Any, family: str, inputs: Any, name: str, P: float = 0.7, **options: Any) -> Any:
    share, exact_layers, late = SETTINGS[name]
    judge = Oracle(
        model,
        family,
        K=0.7,
        P=P,
        L=2,
        threshold=1,
        top=round(share * 5),
        exact=exact_layers,
        late=late,
        **options,
    )
    judge.prompt(inputs, tiny.FAMILIES[family].tokens_per_frame, tiny.FAMILIES[family].token)
    return judge.generate(TOKENS)


@cache
def single(family: str, name: str, frames: int, P: float = 0.7) -> tuple[int, oracle.Answer]:
    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[frames]], [(5, 7)], seed)
        return [ask(model_of(family, seed=seed), family, inputs, name, P)]

    seed, answers = with_margin(3, attempt)
    return seed, answers[0]


def fits(family: str, name: str) -> bool:
    """Whether a family with linear layers has as many full ones as the setting wants."""
    share, exact_layers, late = SETTINGS[name]
    full = tiny.FAMILIES[family].full
    return (late is None or late in full) and (
        share == 0 or len([i for i in full if i < round(5 * share)]) >= max(1, exact_layers)
    )


@families
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("frames", [7, 9])
def test_echoes_and_late_scores_equal_the_oracle(family: str, name: str, frames: int) -> None:
    if not fits(family, name):
        pytest.skip("too few full-attention layers")
    seed, expected = single(family, name, frames)
    inputs = inputs_of(family, [[frames]], [(5, 7)], seed)
    source = tiny.FAMILIES[family].frame_source([[frames]])
    model = model_of(family, seed=seed)
    output, run = compressed(model, settings_of(name), inputs, TOKENS, frame_source=source)
    check(expected, output, inputs, run.report)
    share, exact_layers, late = SETTINGS[name]
    full = [i for i in tiny.FAMILIES[family].full if i < round(5 * share)]
    assert (run.report.echo_layers, run.report.exact_layers) == (len(full), exact_layers)
    assert run.report.scores_late == (late is not None)
    # The same rows are held, and the same bytes, as without.
    _, plain = compressed(model, settings_of("late", echo=0, score_layer=None), inputs, TOKENS,
                          frame_source=source)  # fmt: skip
    assert plain.report.kv_bytes == run.report.kv_bytes
    assert plain.report.echo_layers == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["both", "two exact"])
def test_the_backend_does_not_matter(backend: str, name: str) -> None:
    seed, expected = single("llava_onevision", name, 9)
    inputs = inputs_of("llava_onevision", [[9]], [(5, 7)], seed)
    model = model_of("llava_onevision", backend, seed)
    output, run = compressed(model, settings_of(name), inputs, TOKENS)
    check(expected, output, inputs, run.report)


@cache
def padded(family: str, kind: str) -> tuple[int, list[oracle.Answer]]:
    videos = PADDED[kind]

    def attempt(seed: int) -> list[oracle.Answer]:
        batch = inputs_of(family, videos, PADDED_TEXT, seed)
        model = model_of(family, seed=seed)
        return [
            ask(
                model,
                family,
                alone(family, videos, PADDED_TEXT, i, batch),
                "both",
                videos=counts if tiny.FAMILIES[family].images else (),
            )
            for i, counts in enumerate(videos)
            if counts
        ]

    return with_margin(0, attempt)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("block", [256, 7])
def test_a_padded_batch_equals_each_sample_alone(
    family: str, kind: str, block: int, monkeypatch: Any
) -> None:
    """Also where a block's queries end in the middle of a frame."""
    if kind == "unequal videos" and not tiny.FAMILIES[family].unequal_videos:
        pytest.skip("the stock model takes one tensor of equally long videos")
    monkeypatch.setattr(echoes_of_dycoke, "BLOCK", block)
    seed, answers = padded(family, kind)
    videos = PADDED[kind]
    batch = inputs_of(family, videos, PADDED_TEXT, seed)
    output, run = compressed(model_of(family, "sdpa", seed), settings_of("both"), batch, TOKENS)
    filled = [i for i, counts in enumerate(videos) if counts]
    for i, expected in zip(filled, answers, strict=True):
        check(expected, output, batch, run.report, i)


@pytest.mark.parametrize("reach", [0, 1, 2, 100])
def test_echoes_are_seen_as_far_as_they_reach(reach: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(echoes_of_dycoke, "REACH", reach)
    family = "qwen2_5_vl"

    def attempt(seed: int) -> list[oracle.Answer]:
        inputs = inputs_of(family, [[9]], [(5, 7)], seed)
        return [ask(model_of(family, seed=seed), family, inputs, "both", reach=reach)]

    seed, (expected,) = with_margin(3, attempt)
    inputs = inputs_of(family, [[9]], [(5, 7)], seed)
    output, run = compressed(model_of(family, seed=seed), settings_of("both"), inputs, TOKENS)
    check(expected, output, inputs, run.report)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_computed_everywhere_it_is_the_full_model_blind_behind_the_video(
    family: str, monkeypatch: Any
) -> None:
    """Echoes that are exact in all layers: only the text lacks what was merged."""
    monkeypatch.setattr(echoes_of_dycoke, "REACH", 100)
    model, inputs = model_of(family, "eager"), inputs_of(family, [[7]], [(5, 7)])
    method = DyCoke(prune_ratio=0, echo=1, echo_exact=5)
    # Kept masks are the same in both; read them off a trace.
    with method(model, trace=True) as run:
        output = generate(model, inputs, 1)
    assert run.trace is not None
    keep = torch.cat([mask.flatten() for mask in run.trace.samples[0].keep])
    ids = inputs["input_ids"][0]
    places = (ids == tiny.FAMILIES[family].token).nonzero()[:, 0][: len(keep)]
    merged = places[~keep]
    text = torch.ones(len(ids), dtype=torch.bool)
    text[places] = False
    hidden = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    hidden[text.nonzero(), merged] = True

    def blind(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & ~hidden
        least = torch.finfo(torch.get_default_dtype()).min
        kwargs["attention_mask"] = torch.where(mask, 0.0, least)[None, None]
        return args, kwargs

    hooks = [
        layer.register_forward_pre_hook(blind, with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        expected = generate(model, inputs, 1)
    finally:
        for hook in hooks:
            hook.remove()
    close(output.logits[0], expected.logits[0])
    without, _ = compressed(model, DyCoke(prune_ratio=0), inputs, 1)
    assert not torch.allclose(output.logits[0], without.logits[0])


@families
def test_without_them_nothing_changes(family: str) -> None:
    """The defaults are the paper's; the layer below the pruned ones by its number is None."""
    model, inputs = model_of(family), inputs_of(family, [[7]], [(5, 7)])
    source = tiny.FAMILIES[family].frame_source([[7]])
    below = max(i for i in tiny.FAMILIES[family].full if i < 3)
    paper, _ = compressed(model, DyCoke(), inputs, TOKENS, frame_source=source)
    for method in (DyCoke(echo=0, echo_exact=0), DyCoke(score_layer=below)):
        output, run = compressed(model, method, inputs, TOKENS, frame_source=source)
        assert torch.equal(torch.cat(output.logits), torch.cat(paper.logits))
        assert run.report.score_layer == below and not run.report.scores_late


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("name", ["both", "two exact"])
def test_a_question_on_a_prefilled_video_is_one_go(family: str, name: str) -> None:
    if not fits(family, name):
        pytest.skip("too few full-attention layers")
    seed, expected = single(family, name, 7)
    inputs, model = inputs_of(family, [[7]], [(5, 7)], seed), model_of(family, seed=seed)
    shape = inputs["input_ids"].shape
    prefix = {k: v[:, :-7] if v.shape == shape else v for k, v in inputs.items()}
    with settings_of(name)(model), torch.no_grad():
        watched = cache_of(model(**prefix, use_cache=True))
        for _ in range(2):
            output = generate(
                model,
                {k: inputs[k] for k in ("input_ids", "attention_mask")},
                TOKENS,
                **{cache_name(model.get_decoder()): copy.deepcopy(watched)},
            )
            assert answer(output, inputs)[0] == expected.ids
            # The first selection is that of the question's end, in both.
            close(torch.cat(output.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_beams_and_copies(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family, [[7]], [(5, 7)])
    one, _ = compressed(model, settings_of("both"), inputs, TOKENS)
    same, run = compressed(model, settings_of("both"), inputs, TOKENS, num_return_sequences=2,
                           do_sample=True, top_k=1)  # fmt: skip
    assert answer(same, inputs) == answer(one, inputs) * 2
    beams, _ = compressed(
        model, settings_of("both"), inputs, TOKENS, num_beams=3, output_scores=True
    )
    scores = torch.cat(one.logits).log_softmax(-1)
    greedy = sum(float(s[t]) for s, t in zip(scores, answer(one, inputs)[0], strict=True))
    assert float(beams.sequences_scores[0]) * TOKENS >= greedy - 1e-9
    assert run.report.samples[0].kept_tokens == run.report.samples[1].kept_tokens


@pytest.mark.parametrize("name", ["visionzip", "vidcom2", "random", "flashvid", "evs"])
def test_other_methods_have_echoes_too(name: str) -> None:
    model, inputs = model_of("llava_onevision"), inputs_of("llava_onevision", [[8]], [(5, 7)])
    plain, _ = compressed(model, create(name, retention=0.4), inputs, 3)  # type: ignore[arg-type]
    method: Any = create(f"{name}+", retention=0.4)
    assert (method.echo, method.echo_exact) == (0.5, 1)
    output, run = compressed(model, method, inputs, 3)
    assert run.report.echo_layers == 2 and run.report.exact_layers == 1
    assert not torch.allclose(output.logits[0], plain.logits[0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"echo": 1.5}, ValueError, r"echo must be in \[0, 1\], got 1.5"),
        ({"echo": 0.5, "echo_exact": -1}, ValueError, "echo_exact must be at least 0, got -1"),
        ({"echo_exact": 1}, ValueError, "echo_exact=1 computes what echo=0 leaves out"),
        ({"echo": 0.5, "positions": "compact"}, ValueError, "use positions='original'"),
        ({"score_layer": -1}, ValueError, "score_layer must be .* got -1"),
        ({"score_layer": 1.0}, ValueError, "score_layer must be .* got 1.0"),
        ({"score_layer": True}, TypeError, "score_layer must be .* got True"),
    ],
)
def test_bad_settings_name_the_value(values: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        DyCoke(**values)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llava_onevision", {"score_layer": 5}, "score_layer=5 cannot score: .* 0, 1, 2, 3, 4"),
        ("qwen3_5", {"score_layer": 2}, "score_layer=2 cannot score: .* 1, 3, 4 have full"),
        ("qwen3_5", {"echo": 0.2}, "echo=0.2 is 0 full-attention layers"),
        ("llava_onevision", {"echo": 0.2, "echo_exact": 2}, "use a larger echo, or echo=0"),
        ("gemma4", {"echo": 0.4, "echo_exact": 1}, "per_layer_input, which merged tokens have not"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    family: str, values: dict[str, Any], message: str
) -> None:
    model = model_of(family)
    with pytest.raises(UnsupportedError, match=message), DyCoke(**values)(model):
        pass
    assert not model.get_decoder()._forward_pre_hooks
