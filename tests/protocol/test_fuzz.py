"""Whatever a body holds, it is answered or refused; nothing else is raised."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import npu_zoo
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import parse_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SimpleChatRequest,
    TokenizeRequest,
)

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SHARED: dict[str, Any] = {
    "model": "served",
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "stop": ["a"],
    "max_tokens": 8,
    "seed": 1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1},
    "stream": True,
    "stream_options": {"include_usage": True},
    "metadata": {"a": "b"},
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [3],
    "min_tokens": 1,
    "priority": 1,
    "max_time": 3.5,
}
CHAT = {
    **SHARED,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "logprobs": True,
    "top_logprobs": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "chat_template_kwargs": None,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (ChatCompletionRequest, CHAT),
    "completion": (CompletionRequest, {**SHARED, "prompt": ["a", "b"], "echo": True, "logprobs": 1}),
    "form": (CompletionRequest, {"model": "served", "prompt": [[1]], "structured_outputs": {"json": SCHEMA}}),
    "simple": (SimpleChatRequest, {**SHARED, "prompt": "a"}),
    "tokenize": (TokenizeRequest, {"messages": CHAT["messages"], "tools": CHAT["tools"]}),
    "detokenize": (DetokenizeRequest, {"tokens": [1, 2, 3]}),
}
PACKAGE = str(Path(npu_zoo.__file__).parent)
JARGON = re.compile(r"Input should|pydantic|validat|dict\[|list\[|function-|<\w+>|Traceback|\.py\b|site-packages")
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**300]),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["", "\ud800", "auto", "required", "served", "user", "text", "a" * 2000, "\x00", "{", "start: a"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in entries for place in places(entry, (*path, key)))]


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    body = copy.copy(body)
    body[path[0]] = changed(body[path[0]], path[1:], value)
    return body


def answer(protocol: OpenAIProtocol, request: Any) -> Any:
    if isinstance(request, ChatCompletionRequest):
        return protocol.chat_completion(request, "r")
    if isinstance(request, CompletionRequest):
        return protocol.completion(request, "r")
    if isinstance(request, SimpleChatRequest):
        return protocol.simple_chat(request, "r")
    return protocol.tokenize(request) if isinstance(request, TokenizeRequest) else protocol.detokenize(request)


def check(protocol: OpenAIProtocol, model: Any, body: Any) -> None:
    try:
        found = answer(protocol, parse_request(model, json.dumps(body).encode()))
    except ApiError as error:
        check_refusal(error)
        return
    if isinstance(found, Answering):
        assert all(isinstance(request.sampling_params, SamplingParams) for request in found.requests)
        for request in found.requests:
            protocol.encoder.check(list(request.prompt_token_ids))
    else:
        json.dumps(found, allow_nan=False)


def check_refusal(error: ApiError) -> None:
    """It is the client's fault, told in words that say nothing of how the server is made."""
    assert 400 <= error.status < 500
    assert error.message
    assert not JARGON.search(f"{error.param} {error.message}")
    assert PACKAGE not in error.message
    json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("name", BODIES)
def test_the_bodies_that_are_changed_are_sound(caller: OpenAIProtocol, name: str) -> None:
    model, body = BODIES[name]
    answer(caller, parse_request(model, json.dumps(body).encode()))


@pytest.mark.parametrize("name", BODIES)
@given(data=st.data())
def test_a_body_with_changes(caller: OpenAIProtocol, name: str, data: st.DataObject) -> None:
    model, body = BODIES[name]
    for _ in range(data.draw(st.integers(1, 2))):
        body = changed(body, data.draw(st.sampled_from(places(body))), data.draw(values))
    check(caller, model, body)


@pytest.mark.parametrize("name", BODIES)
@given(data=st.data())
def test_a_body_of_anything_under_known_names(coder: OpenAIProtocol, name: str, data: st.DataObject) -> None:
    model, sound = BODIES[name]
    names = sorted(field.alias or known for known, field in model.model_fields.items())
    given_names = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    kept = {key: value for key, value in sound.items() if key in ("model", "prompt", "messages", "tokens")}
    check(coder, model, {**kept, **{key: data.draw(values) for key in given_names}})


@given(body=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_a_body_of_any_bytes(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatCompletionRequest, body)
    assert caught.value.status == 400
