"""Other clients than OpenAI's own, at the running server and nowhere else.

They are no part of the dev extra: ``pip install langchain-openai litellm`` brings them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import FRAMES, ask_about, data_url

from dycoke.assistant import Assistant
from dycoke.methods import create
from dycoke.nano import stories

TELL = stories.DESCRIBE[0]
STORY, MOST = 304, 12


@pytest.fixture
def messages(clip: Callable[[int], Path]) -> list[dict[str, Any]]:
    return ask_about(data_url(clip(STORY)), TELL)


@pytest.fixture
def expected(nano: Assistant, clip: Callable[[int], Path]) -> Any:
    """By method, what `dycoke run` says."""
    return lambda name: nano.ask(
        clip(STORY), TELL, create(name), frames=FRAMES, max_new_tokens=MOST
    )


class TestLangChain:
    @pytest.fixture
    def chat(self, address: str) -> Callable[..., Any]:
        library = pytest.importorskip("langchain_openai", reason="langchain-openai not installed")

        def make(**more: Any) -> Any:
            own = {"base_url": f"{address}/v1", "api_key": "any", "model": "nano"}
            return library.ChatOpenAI(**own, max_tokens=MOST, max_retries=0, **more)

        return make

    def test_plain(self, chat: Any, messages: Any, expected: Any) -> None:
        for name in ("dycoke", "full"):
            told = expected(name)
            got = chat(extra_body={"dycoke": {"method": name}}).invoke(messages)
            assert got.content == told.text
            assert got.usage_metadata["input_tokens"] == 877
            assert got.usage_metadata["output_tokens"] == len(told.tokens)
            assert got.response_metadata["finish_reason"] == told.finish_reason

    def test_stream_and_usage(self, chat: Any, messages: Any, expected: Any) -> None:
        chunks = list(chat(stream_usage=True).stream(messages))
        assert "".join(chunk.content for chunk in chunks) == expected("dycoke").text
        assert len([chunk for chunk in chunks if chunk.content]) > 5
        (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert (usage["input_tokens"], usage["output_tokens"]) == (877, MOST)

    def test_error(self, chat: Any, messages: Any) -> None:
        import openai

        wrong = chat(extra_body={"dycoke": {"merge_ratio": 7}})
        with pytest.raises(openai.BadRequestError, match="merge_ratio must be in"):
            wrong.invoke(messages)
        with pytest.raises(openai.BadRequestError, match="merge_ratio must be in"):
            list(wrong.stream(messages))


class TestLiteLlm:
    @pytest.fixture
    def complete(self, address: str, monkeypatch: Any) -> Callable[..., Any]:
        # It asks another host for prices otherwise, when it is imported.
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        library = pytest.importorskip("litellm", reason="litellm not installed")
        own = {"api_base": f"{address}/v1", "api_key": "any", "model": "hosted_vllm/nano"}

        def call(messages: Any, **more: Any) -> Any:
            return library.completion(
                **own, messages=messages, max_tokens=MOST, max_retries=0, **more
            )

        return call

    def test_plain(self, complete: Any, messages: Any, expected: Any) -> None:
        for name in ("dycoke", "full"):
            told = expected(name)
            got = complete(messages, extra_body={"dycoke": {"method": name}})
            (choice,) = got.choices
            assert (choice.message.content, choice.finish_reason) == (told.text, told.finish_reason)
            assert got.usage.prompt_tokens == 877
            assert got.usage.completion_tokens == len(told.tokens)

    def test_stream_and_usage(self, complete: Any, messages: Any, expected: Any) -> None:
        chunks = list(complete(messages, stream=True, stream_options={"include_usage": True}))
        words = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(words) == expected("dycoke").text
        usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
        assert (usage[-1].prompt_tokens, usage[-1].completion_tokens) == (877, MOST)

    def test_error(self, complete: Any, messages: Any) -> None:
        litellm: Any = pytest.importorskip("litellm")
        for stream in (False, True):
            with pytest.raises(litellm.BadRequestError, match="merge_ratio must be in"):
                complete(messages, stream=stream, extra_body={"dycoke": {"merge_ratio": 7}})
