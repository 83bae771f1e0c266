"""Programs that sample over the OpenAI API get chats, streams, completions, logprobs and errors as they read them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise litellm downloads it at import

import litellm
import llm
import openai
import pytest
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.tool import ToolInfo, ToolParams
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
REFUSED = "the server does not constrain what the model writes"


def add(a: int) -> int:
    """Add one."""
    return a + 1


@pytest.fixture(scope="module")
def chat_text(base_url: str, model: str) -> str:
    """The greedy answer to MESSAGES, as the openai client gets it."""
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=5, temperature=0)
        return str(answer.choices[0].message.content)


@pytest.fixture(scope="module")
def text(base_url: str, model: str) -> str:
    """The greedy completion of "hi"."""
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        return client.completions.create(model=model, prompt="hi", max_tokens=5, temperature=0).choices[0].text


class TestLitellm:
    @pytest.fixture
    def options(self, base_url: str, model: str) -> dict[str, Any]:
        return {"model": f"openai/{model}", "api_base": base_url, "api_key": "none", "max_tokens": 5, "temperature": 0}

    def test_a_chat_a_stream_and_a_completion(
        self, options: dict[str, Any], model: str, chat_text: str, text: str
    ) -> None:
        assert litellm.completion(messages=MESSAGES, **options).choices[0].message.content == chat_text
        streamed = litellm.completion(messages=MESSAGES, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == chat_text
        completed = litellm.text_completion(prompt="hi", **{**options, "model": f"text-completion-openai/{model}"})
        assert completed.choices[0].text == text

    def test_logprobs_and_tools(self, options: dict[str, Any]) -> None:
        answer = litellm.completion(messages=MESSAGES, logprobs=True, top_logprobs=2, **options)
        first = answer.choices[0].logprobs.content[0]
        assert first.bytes == list(first.token.encode())
        assert len(first.top_logprobs) == 2
        assert litellm.completion(messages=MESSAGES, tools=TOOLS, **options).usage.prompt_tokens > 100
        with pytest.raises(litellm.BadRequestError, match=REFUSED):
            litellm.completion(messages=MESSAGES, tools=TOOLS, tool_choice="required", **options)

    def test_a_prompt_that_is_too_long_is_recognised(self, options: dict[str, Any]) -> None:
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(messages=[{"role": "user", "content": "a" * 2000}], **options)


class TestLangchain:
    @pytest.fixture
    def chat(self, base_url: str, model: str) -> Any:
        return ChatOpenAI(model=model, base_url=base_url, api_key="none", max_tokens=5, temperature=0)

    def test_a_chat_a_stream_and_a_completion(
        self, chat: Any, base_url: str, model: str, chat_text: str, text: str
    ) -> None:
        assert chat.invoke("hi").content == chat_text
        parts = list(chat.stream("hi", stream_usage=True))
        assert "".join(part.content for part in parts) == chat_text
        assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 5
        completion = OpenAI(model=model, base_url=base_url, api_key="none", max_tokens=5, temperature=0)
        assert completion.invoke("hi") == text

    def test_a_history_with_a_call_is_answered(self, chat: Any) -> None:
        call = {"name": "add", "args": {"a": 1}, "id": "c"}
        history = [HumanMessage("hi"), AIMessage("", tool_calls=[call]), ToolMessage("2", tool_call_id="c")]
        answer = chat.bind_tools(TOOLS).invoke(history)
        assert answer.usage_metadata["input_tokens"] > 100
        with pytest.raises(openai.BadRequestError, match=REFUSED):
            chat.bind_tools(TOOLS, tool_choice="required").invoke(history)

    def test_logprobs_have_texts_and_bytes(self, chat: Any) -> None:
        first = chat.bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"][0]
        assert first["bytes"] == list(first["token"].encode())


def test_inspect_ai_gets_chats_logprobs_tools_and_the_reason_of_a_long_prompt(
    base_url: str, model: str, chat_text: str
) -> None:
    async def generate() -> None:
        config = GenerateConfig(max_tokens=5, temperature=0)
        tinkerbell = get_model(f"openai-api/tinkerbell/{model}", base_url=base_url, api_key="none", config=config)
        answer = await tinkerbell.generate("hi", config=GenerateConfig(logprobs=True, top_logprobs=2))
        assert (answer.completion, answer.stop_reason) == (chat_text, "max_tokens")
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
        tool = ToolInfo(name="add", description="Add one.", parameters=ToolParams())
        with_tools = await tinkerbell.generate("hi", tools=[tool], tool_choice="auto")
        assert with_tools.usage.input_tokens > 100
        assert (await tinkerbell.generate("a" * 2000)).stop_reason == "model_length"

    asyncio.run(generate())


def test_lm_eval_scores_answers_and_generates(base_url: str, model: str, text: str) -> None:
    tested = LocalCompletionsAPI(
        base_url=f"{base_url}/completions",
        model=model,
        tokenizer=model,
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=1024,
    )
    pairs = [("hi", "zzz"), ("hi", "a")]
    scores = tested.loglikelihood([Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)])
    for (context, answer), (score, _) in zip(pairs, scores, strict=True):
        with openai.OpenAI(base_url=base_url, api_key="none") as client:
            echoed = client.completions.create(
                model=model, prompt=context + answer, max_tokens=0, echo=True, logprobs=1, temperature=0
            )
        expected = sum(echoed.choices[0].logprobs.token_logprobs[len(context) :])
        assert score == pytest.approx(expected, abs=1e-4)
    until: dict[str, Any] = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    assert tested.generate_until([Instance("generate_until", {}, ("hi", until), 0)]) == [text]


def test_lm_eval_chats(base_url: str, model: str, chat_text: str) -> None:
    tested = LocalChatCompletion(base_url=f"{base_url}/chat/completions", model=model, max_length=1024)
    chat = tested.apply_chat_template(MESSAGES)
    until = {"until": ["\n\n"], "max_gen_toks": 5}
    assert tested.generate_until([Instance("generate_until", {}, (chat, until), 0)]) == [chat_text]


@pytest.fixture
def llm_folder(base_url: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of llm, with one model for each use."""
    entry = f"  model_name: {model}\n  api_base: {base_url}\n"
    uses = {"chat": "", "text": "  completion: true\n", "tools": "  supports_tools: true\n"}
    lines = (f"- model_id: tinkerbell-{use}\n{entry}{option}" for use, option in uses.items())
    (tmp_path / "extra-openai-models.yaml").write_text("".join(lines))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))


@pytest.mark.usefixtures("llm_folder")
@pytest.mark.parametrize("stream", [True, False])
def test_llm_gets_chats_completions_and_tools(chat_text: str, text: str, stream: bool) -> None:
    def answer(use: str, **options: Any) -> Any:
        asked = llm.get_model(f"tinkerbell-{use}")
        return asked.prompt("hi", key="none", max_tokens=5, temperature=0, stream=stream, **options)

    chat = answer("chat")
    assert (chat.text(), chat.usage().output) == (chat_text, 5)
    assert answer("text").text() == text
    with_tools = answer("tools", tools=[add])
    assert with_tools.text()
    assert with_tools.usage().input > 100
