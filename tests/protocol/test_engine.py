"""The protocol with an engine behind it: what it enforces comes out, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from npu_zoo import LLM
from npu_zoo.core.engine import RequestOutput
from npu_zoo.engine.engine import NativeEngine
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Weather?"}], "temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    with LLM(model="deepseek_v3", dtype="float32", max_model_len=1024) as llm:
        assert isinstance(llm.engine, NativeEngine)
        yield llm.engine


@pytest.fixture(scope="module")
def protocol(engine: NativeEngine) -> OpenAIProtocol:
    return OpenAIProtocol(engine.prompts, ["m"])


def run(engine: NativeEngine, answering: Answering) -> tuple[list[RequestOutput], list[dict[str, Any]]]:
    """The last states, and all chunks."""
    places = {request.request_id: i for i, request in enumerate(answering.requests)}
    last: dict[int, RequestOutput] = {}
    chunks = []
    for request in answering.requests:
        engine.add_request(request.request_id, list(request.prompt_token_ids), request.sampling_params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[places[output.request_id]] = output
            chunks += answering.chunks(places[output.request_id], output)
    return [last[i] for i in sorted(last)], chunks


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_are_required_come(
    engine: NativeEngine, protocol: OpenAIProtocol, fake: ModuleType, parallel: bool
) -> None:
    body = {**CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": parallel, "logprobs": True}
    request = validate_request(ChatCompletionRequest, body)
    outputs, chunks = run(engine, protocol.chat_completion(request, "r"))
    whole = fake.whole_chat(protocol.chat_completion(request, "r").response(outputs))
    assert fake.join_chat(chunks) == whole
    (answer,) = whole.values()
    assert answer.content == ""
    calls = list(answer.calls.values())
    if not parallel:
        assert answer.endings == ["tool_calls"]
        assert len(calls) == 1
    arguments = json.loads(calls[0]["arguments"])
    assert calls[0]["name"] == "get_weather"
    assert arguments.keys() == {"city", "days"}
    assert len(arguments["city"]) <= 5
    assert arguments["days"] in range(1, 10)


def test_echoed_completions_of_several_prompts(
    engine: NativeEngine, protocol: OpenAIProtocol, fake: ModuleType
) -> None:
    body = {
        "model": "m",
        "prompt": ["def f(", "import"],
        "echo": True,
        "logprobs": 2,
        "max_tokens": 6,
        "temperature": 0,
    }
    request = validate_request(CompletionRequest, {**body, "n": 2})
    outputs, chunks = run(engine, protocol.completion(request, "r"))
    whole = fake.checked_completion(protocol.completion(request, "r").response(outputs))
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert choice["text"].startswith(body["prompt"][choice["index"] // 2])
        assert "".join(choice["logprobs"]["tokens"][1:]) == choice["text"]
    assert whole["usage"]["completion_tokens"] == 4 * 6
