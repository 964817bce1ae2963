"""What requests may say, and what answers look like, in OpenAI's form. No model, no network."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dycoke.errors import UnsupportedError

LOG = logging.getLogger("dycoke.serve")
HALVES = re.compile(r"\\u[dD][89a-fA-F]")
MOST_SAID = 1000  # characters of an error's message
LEAST_HEAT = 0.01  # of sampling, as in vLLM: less of it overflows
MOST_TEXT = 1 << 20  # characters of a conversation
# Named, since to ignore them would give another answer than was asked for.
REFUSED = {
    "logprobs": "log probabilities are not computed here",
    "top_logprobs": "log probabilities are not computed here",
    "frequency_penalty": "transformers has no such penalty; use repetition_penalty",
    "presence_penalty": "transformers has no such penalty; use repetition_penalty",
    "logit_bias": "not supported",
    "tools": "not supported",
    "functions": "not supported",
    "mm_processor_kwargs": "the processor's settings belong to the model's folder",
    "chat_template_kwargs": "the chat template takes no settings here",
    "allowed_token_ids": "not supported",
    "audio": "answers are text",
    "bad_words": "not supported",
    "chat_template": "the chat template belongs to the model's folder",
    "guided_choice": "not supported",
    "guided_grammar": "not supported",
    "guided_json": "not supported",
    "guided_regex": "not supported",
    "ignore_eos": "an answer ends where the model ends it",
    "include_stop_str_in_output": "an answer ends before what stops it",
    "min_tokens": "an answer ends where the model ends it",
    "prompt_logprobs": "log probabilities are not computed here",
    "stop_token_ids": "use stop, with texts",
    "structured_outputs": "not supported",
    "truncate_prompt_tokens": "ask for fewer frames or with less text",
    "use_beam_search": "answers are greedy or sampled",
}


class ApiError(Exception):
    """What a client did wrong, or what went wrong for it: a status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        # What is quoted may hold what UTF-8 cannot say.
        message = str(self) if len(str(self)) <= MOST_SAID else str(self)[:MOST_SAID] + "…"
        message = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Media:
    """A video or an image as a message names it."""

    kind: str  # "video" or "image"
    url: str


@dataclass(frozen=True)
class ChatRequest:
    """A request that was understood.

    Attributes
    ----------
    turns : the conversation; parts are {"type": "text", "text"} or {"type": "video" or "image"}.
    media : what the parts of the latter types are, in their order.
    frames : frames to sample of each video; None for the server's own number.
    fps : frames a second instead.
    max_tokens : limit of the answer; None for the server's own.
    stop : texts that end the answer.
    sampling : arguments of generate; empty for greedy search.
    seed : of sampling.
    stream, usage : whether chunks are asked for, and a last one that counts tokens.
    compress : settings of ``dycoke``; None for the server's own method.
    steps : whether chunks say what each token looked at.
    """

    turns: tuple[Mapping[str, Any], ...]
    media: tuple[Media, ...]
    frames: int | None = None
    fps: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stream: bool = False
    usage: bool = False
    compress: Mapping[str, Any] | None = None
    steps: bool = False


def parse_json(body: bytes) -> Any:
    """JSON in UTF-8, without the numbers that it does not have, or halves of characters."""

    def no_number(name: str) -> Any:
        raise ApiError(400, f"{name} is no number of JSON")

    try:
        text = body.decode("utf-8-sig")
        made = json.loads(text, parse_constant=no_number)
        if HALVES.search(text):  # two of them can be one character
            json.dumps(made, ensure_ascii=False).encode()
        return made
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def parse_chat(body: Any, models: Sequence[str]) -> ChatRequest:
    """The request in ``body``, as JSON has it.

    Raises
    ------
    ApiError
        For what is missing, wrong, or not supported; it names the field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    model = body.get("model")
    if model is not None and model not in models:
        known = ", ".join(models)
        raise ApiError(
            404, f"the model {model!r} does not exist; there is {known}", "model", "model_not_found"
        )
    for name, why in REFUSED.items():
        if body.get(name):
            raise ApiError(400, f"{name}: {why}; leave it out", name, "unsupported")
    if _number(body, "n", 1, 1, None, whole=True) != 1:
        raise ApiError(400, "n must be 1: ask again for another answer", "n")
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type", "text") != "text":
        raise ApiError(400, "response_format: only text is supported", "response_format")
    turns, media = _conversation(body.get("messages"))
    frames, fps = _frames(body.get("media_io_kwargs"))
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = _number(body, limit, None, 1, None, whole=True)
    compress = body.get("dycoke")
    if compress is not None and not isinstance(compress, dict):
        raise ApiError(400, f"dycoke must be an object of settings, got {compress!r}", "dycoke")
    compress = None if compress is None else dict(compress)
    steps = compress is not None and _flag(compress, "steps")
    if compress is not None:
        compress.pop("steps", None)
    if steps and not body.get("stream"):
        raise ApiError(400, "dycoke: steps come in the chunks of a stream; set stream", "dycoke")
    options = body.get("stream_options")
    return ChatRequest(
        turns=turns,
        media=media,
        frames=frames,
        fps=fps,
        max_tokens=None if max_tokens is None else int(max_tokens),
        stop=_stop(body.get("stop")),
        sampling=_sampling(body),
        seed=_seed(body),
        stream=_flag(body, "stream"),
        usage=isinstance(options, dict) and _flag(options, "include_usage"),
        compress=compress or None,
        steps=steps,
    )


def _conversation(
    messages: Any,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Media, ...]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    turns, media, length = [], [], 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "developer":
            role = "system"
        if role not in ("system", "user", "assistant"):
            raise ApiError(
                400, f"{where}: role must be system, user or assistant, got {role!r}", "messages"
            )
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ApiError(400, f"{where}: content must be text or a list of parts", "messages")
        parts: list[dict[str, str]] = []
        for part in content:
            told = _part(part, where)
            if isinstance(told, Media):
                media.append(told)
                parts.append({"type": told.kind})
            else:
                length += len(told)
                parts.append({"type": "text", "text": told})
        turns.append({"role": role, "content": parts})
    if length > MOST_TEXT:
        raise ApiError(413, f"{length} characters of text, more than {MOST_TEXT}", "messages")
    if turns[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    return tuple(turns), tuple(media)


def _part(part: Any, where: str) -> str | Media:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if kind in ("video_url", "image_url"):
        inner = part.get(kind)
        url = inner.get("url") if isinstance(inner, dict) else inner
        if isinstance(url, str) and url:
            # Dify sends videos so.
            video = kind == "video_url" or url[:11].lower() == "data:video/"
            return Media("video" if video else "image", url)
        raise ApiError(400, f"{where}: {kind} needs a url", "messages")
    raise ApiError(
        400,
        f"{where}: a part must be a text, video_url or image_url with its value, got type {kind!r}",
        "messages",
    )


def _frames(given: Any) -> tuple[int | None, float | None]:
    video = given.get("video") if isinstance(given, dict) else None
    if given is not None and not isinstance(given, dict):
        raise ApiError(400, "media_io_kwargs must be an object", "media_io_kwargs")
    if video is None:
        return None, None
    if not isinstance(video, dict):
        raise ApiError(400, "media_io_kwargs.video must be an object", "media_io_kwargs")
    frames = _number(video, "num_frames", None, 1, None, whole=True)
    fps = _number(video, "fps", None, 0, None, above=True)
    if frames is not None and fps is not None:
        raise ApiError(400, "num_frames and fps exclude each other; drop one", "media_io_kwargs")
    return None if frames is None else int(frames), fps


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of generate; what changes greedy search, too, is always among them."""
    made: dict[str, Any] = {}
    penalty = _number(body, "repetition_penalty", None, 0.01, 100)
    if penalty is not None:  # 1 is none, where the model's folder has another
        made["repetition_penalty"] = float(penalty)
    temperature = _number(body, "temperature", 0, 0, 100)
    top_p = _number(body, "top_p", 1, 0, 1, above=True)
    min_p = _number(body, "min_p", None, 0, 1)
    top_k = _number(body, "top_k", None, -1, None, whole=True)
    if not temperature:
        return made
    made |= {"do_sample": True, "temperature": max(float(temperature), LEAST_HEAT)}
    made["top_p"] = float(1 if top_p is None else top_p)
    made["top_k"] = int(top_k) if top_k is not None and top_k > 0 else 0
    if min_p:
        made["min_p"] = min_p
    return made


def _seed(body: Mapping[str, Any]) -> int | None:
    seed = _number(body, "seed", None, None, None, whole=True)
    return None if seed is None else int(seed) % (1 << 63)


def _stop(given: Any) -> tuple[str, ...]:
    stop = [given] if isinstance(given, str) else given or []
    if (
        not isinstance(stop, list)
        or len(stop) > 16
        or not all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stop)
    ):
        raise ApiError(400, "stop must be a text, or up to 16 of 1 to 1000 characters", "stop")
    return tuple(stop)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, got {value!r}", name)
    return bool(value)


def _number(
    body: Mapping[str, Any],
    name: str,
    default: float | None,
    low: float | None,
    high: float | None,
    *,
    whole: bool = False,
    above: bool = False,
) -> float | None:
    """A number of the body in [low, high], or in (low, high] with ``above``."""
    value = body.get(name)
    if value is None:
        return default
    kinds = int if whole else (int, float)
    wrong = isinstance(value, bool) or not isinstance(value, kinds)
    if not wrong:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        wrong = not math.isfinite(number)
        wrong |= low is not None and (number < low or (above and number == low))
        wrong |= high is not None and number > high
    if wrong:
        what = "a whole number" if whole else "a number"
        bounds = [f"above {low:g}" if above else f"of at least {low:g}"] if low is not None else []
        bounds += [f"at most {high:g}"] if high is not None else []
        what = " ".join([what, " and ".join(bounds)]).strip()
        raise ApiError(400, f"{name} must be {what}, got {value!r}", name)
    return value  # type: ignore[no-any-return]


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error in the library; the server's own faults are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnsupportedError | ValueError | TypeError):
        return ApiError(400, str(error))
    if "out of memory" in str(error).lower():
        return ApiError(503, "the server ran out of memory; ask for fewer frames", code="memory")
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__} in the server")


# Answers


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer; the prompt's are those of the whole prompt, before compression."""

    prompt: int
    completion: int
    visual: int
    kept: int
    cached: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {
                "cached_tokens": self.cached,
                "video_tokens": self.visual,
                "video_tokens_kept": self.kept,
            },
        }


@dataclass(frozen=True)
class Head:
    """What every part of one answer begins with."""

    id: str
    created: int
    model: str

    def completion(
        self, text: str, reason: str, usage: Usage, report: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": usage.body(),
            "dycoke": report,
        }

    def chunk(
        self, delta: Mapping[str, Any] | None, reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """A chunk; without choices where ``delta`` is None."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [] if delta is None else [choice],
            **more,
        }


def event(data: Mapping[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
