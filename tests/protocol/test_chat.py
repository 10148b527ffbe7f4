"""Chat completions: what an engine is asked for, and whole answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from npu_zoo.core.errors import ConfigError
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, SimpleChatRequest

USER = [{"role": "user", "content": "Say hello."}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return validate_request(ChatCompletionRequest, {"model": "served", "messages": USER, **fields})


def params(protocol: OpenAIProtocol, **fields: Any) -> SamplingParams:
    return protocol.chat_completion(chat(**fields), "r").requests[0].sampling_params


def refused(protocol: OpenAIProtocol, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        protocol.chat_completion(chat(**fields), "r")
    return caught.value


def test_a_bare_request_has_openai_s_defaults(coder: OpenAIProtocol) -> None:
    answering = coder.chat_completion(chat(), "r1")
    (request,) = answering.requests
    room = coder.encoder.max_model_len - len(request.prompt_token_ids)
    assert request.sampling_params == SamplingParams(max_tokens=room)
    assert list(request.prompt_token_ids) == coder.encoder.render_chat(USER)
    assert (request.request_id, request.priority, request.max_time) == ("r1", 0, None)
    assert not answering.stream


def test_every_field_reaches_the_engine(coder: OpenAIProtocol) -> None:
    said: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": 11,
        "n": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 2,
    }
    extra = {"logit_bias": {"5": -3.5}, "logprobs": True, "top_logprobs": 4, "max_completion_tokens": 9}
    request = coder.chat_completion(chat(**said, **extra, priority=-2, max_time=1.5), "r").requests[0]
    expected = SamplingParams(**said, logit_bias={5: -3.5}, logprobs=4, max_tokens=9)
    assert request.sampling_params == expected
    assert (request.priority, request.max_time) == (-2, 1.5)


def test_a_request_goes_before_the_defaults(coder: OpenAIProtocol) -> None:
    protocol = OpenAIProtocol(coder.encoder, ["served"], defaults={"temperature": 0.6, "top_p": 0.95, "max_tokens": 5})
    assert params(protocol) == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=5)
    assert params(protocol, temperature=0, max_tokens=7) == SamplingParams(temperature=0, top_p=0.95, max_tokens=7)


@pytest.mark.parametrize("defaults", [{"temperature": -1}, {"tempo": 1}, {"logprobs": 3}])
def test_defaults_that_no_request_could_have(coder: OpenAIProtocol, defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(defaults))):
        OpenAIProtocol(coder.encoder, ["served"], defaults=defaults)


def test_an_unknown_model(coder: OpenAIProtocol) -> None:
    error = refused(coder, model="gpt-4o")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert "served" in error.message


def test_a_prompt_that_is_too_long_says_both_numbers(coder: OpenAIProtocol) -> None:
    error = refused(coder, messages=[{"role": "user", "content": "word " * 5000}])
    assert (error.status, error.param, error.code) == (400, "messages", "context_length_exceeded")
    assert str(coder.encoder.max_model_len) in error.message


def test_more_output_than_there_is_room_says_the_numbers(coder: OpenAIProtocol) -> None:
    used, longest = len(coder.encoder.render_chat(USER)), coder.encoder.max_model_len
    assert params(coder, max_tokens=longest - used).max_tokens == longest - used
    error = refused(coder, max_tokens=longest - used + 1)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    for number in (used, longest, longest - used + 1, longest + 1):
        assert str(number) in error.message


LIMITS = ProtocolLimits(
    max_n=2,
    max_stop=2,
    max_stop_length=5,
    max_logprobs=3,
    max_messages=2,
    max_logit_bias=1,
    max_schema_bytes=100,
    max_tools=1,
)
SCHEMA = {"type": "object", "description": "x" * 100}
TOOL = {"type": "function", "function": {"name": "f"}}
BEYOND: list[tuple[dict[str, Any], str, int]] = [
    ({"n": 3}, "n", 2),
    ({"stop": ["a", "b", "c"]}, "stop", 2),
    ({"stop": "abcdef"}, "stop", 5),
    ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids", 2),
    ({"logprobs": True, "top_logprobs": 4}, "top_logprobs", 3),
    ({"prompt_logprobs": 4}, "prompt_logprobs", 3),
    ({"messages": USER * 3}, "messages", 2),
    ({"logit_bias": {"1": 1, "2": 1}}, "logit_bias", 1),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", 100),
    ({"structured_outputs": {"regex": "a" * 101}}, "structured_outputs.regex", 100),
    ({"structured_outputs": {"choice": ["a" * 60, "b" * 60]}}, "structured_outputs.choice", 100),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        "response_format.json_schema.schema",
        100,
    ),
    ({"tools": [TOOL, TOOL]}, "tools", 1),
]


@pytest.mark.parametrize(("fields", "param", "limit"), BEYOND, ids=[param for _, param, _ in BEYOND])
def test_beyond_a_limit(caller: OpenAIProtocol, fields: dict[str, Any], param: str, limit: int) -> None:
    error = refused(OpenAIProtocol(caller.encoder, ["served"], LIMITS), **fields)
    assert error.param == param
    assert f"at most {limit} are taken" in error.message


OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"stop": ""}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), OUT_OF_RANGE, ids=str)
def test_what_this_model_cannot_do_names_the_field(coder: OpenAIProtocol, fields: dict[str, Any], param: str) -> None:
    error = refused(coder, **fields)
    assert (error.status, error.param) == (400, param)


FORMS: list[tuple[dict[str, Any], StructuredOutputs | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "null"}}}},
        StructuredOutputs(json='{"type": "null"}'),
    ),
    ({"structured_outputs": {"json": '{"type":"null"}'}}, StructuredOutputs(json='{"type": "null"}')),
    ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputs(grammar='start: "a"')),
]


@pytest.mark.parametrize(("fields", "form"), FORMS, ids=str)
def test_forms_of_outputs(coder: OpenAIProtocol, fields: dict[str, Any], form: StructuredOutputs | None) -> None:
    assert params(coder, **fields).structured_outputs == form


def test_threads_may_share_a_protocol(coder: OpenAIProtocol) -> None:
    protocol = OpenAIProtocol(PromptEncoder(coder.encoder.config), ["served"])
    forms = [{"type": "string", "maxLength": length % 90 + 1} for length in range(180)]

    def form_of(schema: dict[str, Any]) -> StructuredOutputs | None:
        return params(protocol, structured_outputs={"json": schema}).structured_outputs

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(form_of, forms)) == [StructuredOutputs(json=json.dumps(schema)) for schema in forms]


def test_parts_and_roles_become_what_templates_read(coder: OpenAIProtocol) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    found = coder.chat_completion(chat(messages=messages), "r").requests[0].prompt_token_ids
    assert list(found) == coder.encoder.render_chat(plain)


def test_variables_of_the_template_s_own(coder: OpenAIProtocol) -> None:
    encoder = PromptEncoder(coder.encoder.config)
    tokenizer = encoder.need_tokenizer("tests")
    tokenizer._template = "{{ bos_token }}{{ 'deep' if thinking else 'plain' }} {{ messages[0].content }}"
    protocol = OpenAIProtocol(encoder, ["served"])
    for thinking, word in ((True, "deep"), (False, "plain")):
        answering = protocol.chat_completion(chat(chat_template_kwargs={"thinking": thinking}), "r")
        assert word in tokenizer.decode(answering.requests[0].prompt_token_ids)
    for name in ("thinkin", "messages", "bos_token", "add_generation_prompt"):
        error = refused(protocol, chat_template_kwargs={name: "x"})
        assert error.status == 400
        assert "it reads thinking" in error.message


def test_a_whole_answer(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = coder.chat_completion(chat(n=2, logprobs=True, top_logprobs=1, prompt_logprobs=1), "r")
    generated = fake.Generated(coder, answering, [["Hello, wörld", ""]])
    response = answering.response(generated.final())
    found = fake.whole_chat(response)
    assert (response["id"], response["model"], response["object"]) == ("chatcmpl-r", "served", "chat.completion")
    assert [found[i].content for i in (0, 1)] == ["Hello, wörld", ""]
    ids = generated.ids[0][0]
    used = len(answering.requests[0].prompt_token_ids)
    assert response["usage"] == {
        "prompt_tokens": used,
        "completion_tokens": len(ids),
        "total_tokens": used + len(ids),
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    entries = found[0].logprobs
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "Hello, wörld"
    assert [entry["top_logprobs"][0]["logprob"] for entry in entries] == [-0.25 * (i % 7) - 1 for i in range(len(ids))]
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)
    assert len(response["prompt_logprobs"]) == used


@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
def test_every_end_has_a_word_of_openai_s(coder: OpenAIProtocol, fake: ModuleType, finish: str) -> None:
    answering = coder.chat_completion(chat(), "r")
    choice = answering.response(fake.Generated(coder, answering, [["a"]], finish=finish).final())["choices"][0]
    assert choice["finish_reason"] == ("stop" if finish == "stop" else "length")
    assert choice["stop_reason"] == ("abort" if finish == "abort" else None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_output_that_lost_its_form_is_no_answer(coder: OpenAIProtocol, fake: ModuleType, stream: bool) -> None:
    answering = coder.chat_completion(chat(stream=stream), "r")
    (state,) = fake.Generated(coder, answering, [["{"]], finish="error").final()
    state.outputs[0].stop_reason = "no token keeps the form"
    with pytest.raises(ApiError, match="no token keeps the form") as caught:
        answering.chunks(0, state) if stream else answering.response([state])
    assert (caught.value.status, caught.value.code) == (400, "output_failed")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_an_answer_s_tokens(coder: OpenAIProtocol, field: str) -> None:
    limited = OpenAIProtocol(coder.encoder, ["served"], ProtocolLimits(max_completion_tokens=8))
    with pytest.raises(ApiError, match="asks for 9 tokens of an answer; at most 8 are taken") as caught:
        limited.chat_completion(chat(**{field: 9}), "r")
    assert caught.value.param == field
    assert given_tokens(limited, **{field: 8}) == 8
    assert given_tokens(limited, **{field: 2}) == 2


def test_a_limit_of_an_answer_s_tokens_is_what_a_chat_gets(coder: OpenAIProtocol) -> None:
    limits = ProtocolLimits(max_completion_tokens=8)
    assert given_tokens(OpenAIProtocol(coder.encoder, ["served"], limits)) == 8
    assert given_tokens(OpenAIProtocol(coder.encoder, ["served"], limits, {"max_tokens": 5})) == 5
    assert given_tokens(OpenAIProtocol(coder.encoder, ["served"], limits, {"max_tokens": 50})) == 8


def given_tokens(protocol: OpenAIProtocol, **fields: Any) -> int | None:
    return protocol.chat_completion(chat(**fields), "r").requests[0].sampling_params.max_tokens


def test_a_logprob_of_minus_infinity_can_be_written(coder: OpenAIProtocol, fake: ModuleType) -> None:
    from npu_zoo.core.engine import Logprob

    answering = coder.chat_completion(chat(logprobs=True), "r")
    (state,) = fake.Generated(coder, answering, [["a"]]).final()
    answer = state.outputs[0]
    answer.logprobs = [{answer.token_ids[0]: Logprob(float("-inf"), 9, "a")}]
    entry = answering.response([state])["choices"][0]["logprobs"]["content"][0]
    assert (entry["logprob"], entry["top_logprobs"]) == (-9999.0, [])


def test_reasoning_stands_beside_the_answer(thinker: OpenAIProtocol, fake: ModuleType) -> None:
    answering = thinker.chat_completion(chat(), "r")
    response = answering.response(fake.Generated(thinker, answering, [["2+2\n</think>\n\n4"]], opened=True).final())
    message = response["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("2+2\n", "\n\n4")


def test_a_simple_chat_is_a_conversation_of_one_prompt(coder: OpenAIProtocol) -> None:
    simple = validate_request(SimpleChatRequest, {"prompt": "Say hello.", "temperature": 0, "stop": "x"})
    found, due = coder.simple_chat(simple, "r"), coder.chat_completion(chat(temperature=0, stop="x"), "r")
    assert found.requests == due.requests


def test_a_simple_chat_needs_its_prompt() -> None:
    with pytest.raises(ApiError) as caught:
        validate_request(SimpleChatRequest, {})
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert caught.value.body()["error"]
