"""What a request may say, and how a fault of it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npu_zoo.protocol.bodies import MAX_DEPTH, parse_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SimpleChatRequest,
    TokenizeRequest,
)

MODELS: list[Any] = [ChatCompletionRequest, CompletionRequest, SimpleChatRequest, TokenizeRequest, DetokenizeRequest]
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def refused(model: Any, body: bytes | dict[str, Any]) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse_request(model, data)
    assert caught.value.status == 400
    json.dumps(caught.value.body(), ensure_ascii=False).encode()
    return caught.value


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "must be at least 0, not -1"),
    ({"temperature": "1"}, "temperature", 'must be a number, not "1"'),
    ({"temperature": True}, "temperature", "must be a number, not true"),
    ({"top_p": 0}, "top_p", "must be above 0"),
    ({"n": 0}, "n", "must be at least 1"),
    ({"n": 1.0}, "n", "must be an integer, not 1.0"),
    ({"n": 10**400}, "n", "must be at most"),
    ({"seed": 2**70}, "seed", "must be at most"),
    ({"stream": "yes"}, "stream", 'must be true or false, not "yes"'),
    ({"stop": 3}, "stop", "must be a string or a list of strings"),
    ({"stop": ["a", 3]}, "stop.1", "must be a string, not 3"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"guided_json": {}}, "guided_json", "use structured_outputs.json"),
    ({"guided_regex": "a"}, "guided_regex", "use structured_outputs.regex"),
    ({"guided_choice": []}, "guided_choice", "use structured_outputs.choice"),
    ({"guided_grammar": "a"}, "guided_grammar", "use structured_outputs.grammar"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "llguidance"),
    ({"bad_words": ["a"]}, "bad_words", "use logit_bias"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids", "or logit_bias"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "are not cut"),
    ({"spaces_between_special_tokens": True}, "spaces_between_special_tokens", "without spaces"),
    ({"continue_final_message": True}, "continue_final_message", "use /v1/completions"),
    ({"max tokens": 5}, "max tokens", "did you mean max_tokens?"),
    ({"functions": []}, "functions", "use tools"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "must be at most 100, not 101"),
    ({"logit_bias": []}, "logit_bias", "must be an object, not a list"),
    ({"best_of": 2}, "best_of", "n is 1"),
    ({"stream_options": {}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "did you mean include_usage?"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not given in streams"),
    ({"max_tokens": 0}, "max_tokens", "must be at least 1, not 0"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "contradicts max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"max_time": 0}, "max_time", "must be above 0"),
    ({"messages": []}, "messages", "at least 1 entries"),
    ({"messages": "x"}, "messages", 'must be a list, not "x"'),
    ({"messages": ["x"]}, "messages.0", "whose role is"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "whose role is system, developer, user"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string or a list of parts"),
    ({"messages": [{"role": "assistant"}]}, "messages.0.content", "no tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages.0.content.1.type",
        '"image_url", and this server takes text parts only',
    ),
    ({"tool_choice": "auto"}, "tool_choice", "there are none"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required'"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", '"a b" does not'),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required with type json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    ({"structured_outputs": {}}, "structured_outputs", "given none"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "given json and regex"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "must be a JSON schema"),
    ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs.x", "must be text, a number, true, false or null"),
    ({"modalities": ["audio"]}, "modalities.0", "'text'"),
]


@pytest.mark.parametrize(("change", "param", "message"), FAULTS, ids=[f"{c}"[:60] for c, _, _ in FAULTS])
def test_a_fault_names_its_field(change: dict[str, Any], param: str, message: str) -> None:
    error = refused(ChatCompletionRequest, {**CHAT, **change})
    assert error.param == param
    assert error.message.startswith(param)
    assert message in error.message


def test_several_faults_are_told_at_once() -> None:
    error = refused(ChatCompletionRequest, {**CHAT, "temperature": 3, "n": "4"})
    assert error.message == 'temperature must be at most 2, not 3; n must be an integer, not "4"'


PROMPTS: list[Any] = [[], [True], [1, "a"], ["a", 1], [[1], "a"], {}, 5, [-1], [2**31], [[1.0]], None]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_a_prompt_of_no_form_is_refused(prompt: Any) -> None:
    error = refused(CompletionRequest, {"model": "m", "prompt": prompt})
    assert str(error.param).split(".")[0] == "prompt"


@pytest.mark.parametrize("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_of_every_form(prompt: Any) -> None:
    assert parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()).prompt == prompt


BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "cut off": (b'{"model": ', "Expecting value at column 11"),
    "cut off in a further line": (b'{"model":\n', "line 2, column 1"),
    "no object": (b"[1]", "a JSON object, not a list"),
    "null": (b"null", "a JSON object, not null"),
    "no UTF-8": (b'{"model": "\xff"}', "not UTF-8: byte 11"),
    "NaN": (b'{"temperature": NaN}', "temperature is NaN"),
    "Infinity": (b'{"logit_bias": {"5": -Infinity}}', "logit_bias.5 is -Infinity"),
    "NaN alone": (b"NaN", "the body is NaN"),
    "NaN, cut off": (b'{"temperature": NaN', "NaN, Infinity or an integer"),
    "nested": (b"[" * 200_000, "nests deeper"),
    "digits": (b'{"n": ' + b"1" * 5000 + b"}", "n is an integer of 5000 digits"),
}


@pytest.mark.parametrize(("body", "message"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request(body: bytes, message: str) -> None:
    assert message in refused(ChatCompletionRequest, body).message


def test_a_number_beyond_all_bounds_names_its_field() -> None:
    error = refused(CompletionRequest, b'{"model": "m", "prompt": "x", "temperature": 1e999}')
    assert error.param == "temperature"
    assert "finite" in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "a\\ud800"}', "prompt"),
        (b'{"messages": [{"content": "\\udfff"}]}', "messages.0.content"),
        (b'{"stop": ["a", "\\ud83d"]}', "stop.1"),
        (b'{"metadata": {"\\ud800": 1}}', "metadata.\\ud800"),
    ],
)
def test_half_a_surrogate_pair_names_its_field(body: bytes, param: str) -> None:
    error = refused(CompletionRequest, body)
    assert error.param == param
    assert "surrogate" in error.message


def test_a_whole_surrogate_pair_is_a_character() -> None:
    body = b'{"model": "m", "prompt": "\\ud83d\\ude80"}'
    assert parse_request(CompletionRequest, body).prompt == "\N{ROCKET}"


def test_what_nests_too_deep_names_its_field() -> None:
    nested: Any = {}
    for _ in range(MAX_DEPTH):
        nested = {"a": nested}
    assert refused(ChatCompletionRequest, {**CHAT, "metadata": nested}).param == "metadata.a.a"


@pytest.mark.parametrize("model", MODELS)
def test_null_is_unset_where_a_field_has_a_default(model: Any) -> None:
    required = {"model": "m", "messages": CHAT["messages"], "prompt": "x", "tokens": [1]}
    needed = {name: value for name, value in required.items() if name in model.model_fields}
    if model is TokenizeRequest:
        del needed["messages"]
    nulls = {field.alias or name: None for name, field in model.model_fields.items() if not field.is_required()}
    given = parse_request(model, json.dumps({**nulls, **needed}).encode())
    assert given.model_dump(exclude_none=True).keys() == needed.keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_schema_says_that_nothing_else_is_taken(model: Any) -> None:
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    assert all(part["additionalProperties"] is False for part in objects if part.get("type") == "object")


def test_answers_of_openai_s_client_can_be_sent_back() -> None:
    from openai.types.chat import ChatCompletionMessage

    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]}
    body = {**CHAT, "messages": [*CHAT["messages"], message.model_dump(), result]}
    assert len(parse_request(ChatCompletionRequest, json.dumps(body).encode()).messages) == 3
