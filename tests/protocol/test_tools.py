"""Tools: what the model is told of them, what is enforced, and what comes back."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.dispatch import resolve
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.plugins.deepseek_v3.prompts import TOOLS, V31_TOOLS
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.messages import Tool
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, TokenizeRequest
from npu_zoo.protocol.tool_calls import ToolCallReader
from npu_zoo.protocol.tools import call_rules
from npu_zoo.testing import unchecked_config

USER = [{"role": "user", "content": "Weather in Köln?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Of a city", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
FORMATS = {"v3": TOOLS, "v3.1": V31_TOOLS}


def ask(protocol: OpenAIProtocol, **fields: Any) -> Answering:
    body = {"model": "served", "messages": USER, "tools": [WEATHER, NOW], **fields}
    return protocol.chat_completion(validate_request(ChatCompletionRequest, body), "r")


def refused(protocol: OpenAIProtocol, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(protocol, **fields)
    assert caught.value.status == 400
    return caught.value


def prompt_of(protocol: OpenAIProtocol, **fields: Any) -> str:
    ids = ask(protocol, **fields).requests[0].prompt_token_ids
    return protocol.encoder.need_tokenizer("tests").decode(ids, skip_special_tokens=False)


def written(name: str, arguments: str, form: Any = TOOLS) -> str:
    inner = f"{form.before_name}{name}{form.before_arguments}{arguments}{form.after_arguments}"
    return f"{form.call_begin}{inner}{form.call_end}"


def test_the_model_is_told_of_tools_in_the_system_message(caller: OpenAIProtocol) -> None:
    prompt = prompt_of(caller, messages=[{"role": "system", "content": "Be brief."}, *USER])
    head, _, rest = prompt.partition("<｜User｜>")
    assert head.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n")
    for part in ("get_weather", "Of a city", json.dumps(SCHEMA), "now", TOOLS.begin, TOOLS.end):
        assert part in head
    assert rest.startswith("Weather in Köln?")
    assert "get_weather" in prompt_of(caller)


def test_no_tools_are_shown_where_none_is_to_be_called(caller: OpenAIProtocol, fake: ModuleType) -> None:
    assert prompt_of(caller, tool_choice="none") == prompt_of(caller, tools=None)
    answering = ask(caller, tool_choice="none")
    text = TOOLS.begin + written("now", "{}") + TOOLS.end
    message = answering.response(fake.Generated(caller, answering, [[text]]).final())["choices"][0]["message"]
    assert message["content"] == text


def test_a_template_that_reads_tools_gets_them(caller: OpenAIProtocol) -> None:
    encoder = PromptEncoder(caller.encoder.config)
    tokenizer = encoder.need_tokenizer("tests")
    tokenizer._template = (
        "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ messages[0].content }}"
    )
    assert "tools" in tokenizer.template_variables
    prompt = prompt_of(OpenAIProtocol(encoder, ["served"]))
    assert prompt.endswith("[get_weather][now]Weather in Köln?")


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        ("{{ messages[0].content }} tools", False),
        ("{% set tools = [] %}{{ tools }}", False),
        ("{% if tools is defined %}x{% endif %}", True),
        ("{% for m in messages %}{% if not tools %}{% continue %}{% endif %}{% endfor %}", True),
        ("{% generation %}{{ tools }}{% endgeneration %}", True),
    ],
)
def test_whether_a_template_reads_tools(caller: OpenAIProtocol, template: str, reads: bool) -> None:
    tokenizer = PromptEncoder(caller.encoder.config).need_tokenizer("tests")
    tokenizer._template = template
    assert ("tools" in tokenizer.template_variables) is reads


def test_a_model_without_a_format_says_which_variants_have_one(coder: OpenAIProtocol) -> None:
    assert "leave the tools out" in refused(coder).message
    config = unchecked_config(resolve(EngineArgs(model="deepseek_v3")), tools=None)
    error = refused(OpenAIProtocol(PromptEncoder(config), ["served"]))
    assert error.param == "tools"
    assert "deepseek_v3:671b-v3.1" in error.message
    assert "v2-lite" not in error.message


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [NOW, NOW]}, "tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
            "tool_choice": "required",
        },
        "tools.0.function.parameters",
    ),
    (
        {"tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]},
        "tools.1.function.parameters",
    ),
    (
        {
            "tools": [NOW, {"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://x/"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        "tools.1.function.parameters",
    ),
    (
        {
            "tools": [WEATHER, {"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}],
            "response_format": {"type": "json_object"},
        },
        "tools.1.function.parameters",
    ),
    (
        {
            "messages": [*USER, {"role": "tool", "content": "4", "tool_call_id": "c"}],
        },
        "messages.1",
    ),
    (
        {
            "messages": [
                *USER,
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "now", "arguments": "{}"}}]},
                {"role": "tool", "content": "4", "tool_call_id": "c"},
                {"role": "tool", "content": "4", "tool_call_id": "d"},
            ],
        },
        "messages.3.tool_call_id",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}]}, "tools"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
def test_what_is_refused_names_the_field(caller: OpenAIProtocol, fields: dict[str, Any], param: str) -> None:
    assert refused(caller, **fields).param == param


def accepts(protocol: OpenAIProtocol, form: StructuredOutputs | None, text: str) -> bool:
    """Whether llguidance lets a model write the whole text and end there."""
    assert form is not None
    encoder = protocol.encoder
    guide = encoder.guides.make(form)
    ids = [*encoder.need_tokenizer("tests").encode(text, False), min(encoder.stop_token_ids)]
    for place, token_id in enumerate(ids):
        mask = guide.mask()
        if guide.error or not mask[token_id // 8] >> token_id % 8 & 1:
            return False
        guide.advance(ids[: place + 1], 0)
    return True


CITY = written("get_weather", '{"city": "Köln"}')
CHOICES: list[tuple[Any, bool, str, bool]] = [
    ("required", True, TOOLS.begin + CITY + TOOLS.end, True),
    ("required", True, TOOLS.begin + CITY + "\n" + written("now", "{}") + TOOLS.end, True),
    ("required", False, TOOLS.begin + CITY + TOOLS.end, True),
    ("required", False, TOOLS.begin + CITY + "\n" + written("now", "{}") + TOOLS.end, False),
    ("required", True, "It rains.", False),
    ("required", True, TOOLS.begin + TOOLS.end, False),
    ("required", True, TOOLS.begin + written("get_weather", '{"city": 3}') + TOOLS.end, False),
    ("required", True, TOOLS.begin + written("now", '{"city": "Köln"}') + TOOLS.end, False),
    (NAMED, True, TOOLS.begin + written("now", "{}") + TOOLS.end, True),
    (NAMED, True, TOOLS.begin + CITY + TOOLS.end, False),
]


@pytest.mark.parametrize(("choice", "parallel", "text", "taken"), CHOICES)
def test_what_a_choice_enforces(caller: OpenAIProtocol, choice: Any, parallel: bool, text: str, taken: bool) -> None:
    params = ask(caller, tool_choice=choice, parallel_tool_calls=parallel).requests[0].sampling_params
    assert accepts(caller, params.structured_outputs, text) is taken


def test_a_form_of_the_answer_leaves_room_for_calls(caller: OpenAIProtocol) -> None:
    params = ask(caller, response_format={"type": "json_object"}).requests[0].sampling_params
    assert accepts(caller, params.structured_outputs, '{"a": 1}')
    assert accepts(caller, params.structured_outputs, TOOLS.begin + CITY + TOOLS.end)
    assert not accepts(caller, params.structured_outputs, "It rains.")


def test_nothing_is_enforced_where_the_model_is_free(caller: OpenAIProtocol) -> None:
    assert ask(caller).requests[0].sampling_params.structured_outputs is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@settings(max_examples=20)
@given(city=st.text(max_size=9).filter(lambda text: text.isprintable()), count=st.integers(1, 3))
def test_what_the_grammar_takes_is_read_back(caller: OpenAIProtocol, form: Any, city: str, count: int) -> None:
    rules = call_rules(form, {0: Tool.model_validate(WEATHER)}, True, ProtocolLimits())
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    call = written("get_weather", arguments, form)
    text = form.begin + form.between.join([call] * count) + form.end
    assert accepts(caller, StructuredOutputs(grammar=f"start: calls\n{rules}"), text)
    content, pieces = ToolCallReader(form).feed(text)
    assert (content, [piece.name for piece in pieces if piece.name]) == ("", ["get_weather"] * count)
    assert "".join(piece.arguments for piece in pieces) == arguments * count


def test_calls_of_a_whole_answer(thinker: OpenAIProtocol, fake: ModuleType) -> None:
    answering = ask(thinker)
    text = f"rain?</think>Let me see.{TOOLS.begin}{CITY}\n{CITY}{TOOLS.end}"
    response = answering.response(fake.Generated(thinker, answering, [[text]], opened=True).final())
    choice = response["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("rain?", "Let me see.")
    one, two = choice["message"]["tool_calls"]
    assert one["function"] == two["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert one["id"] != two["id"]
    fake.whole_chat(response)


def test_an_answer_of_calls_alone_has_no_content(caller: OpenAIProtocol, fake: ModuleType) -> None:
    answering = ask(caller)
    text = TOOLS.begin + CITY + TOOLS.end
    message = answering.response(fake.Generated(caller, answering, [[text]]).final())["choices"][0]["message"]
    assert message["content"] is None


def test_calls_that_a_limit_cut_off_end_with_length(caller: OpenAIProtocol, fake: ModuleType) -> None:
    answering = ask(caller, tool_choice="required")
    text = TOOLS.begin + CITY[: CITY.index("Köln")]
    response = answering.response(fake.Generated(caller, answering, [[text]], finish="length").final())
    choice = response["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_the_same_request_has_the_same_call_ids_and_others_do_not(caller: OpenAIProtocol, fake: ModuleType) -> None:
    def call_id(name: str) -> str:
        body = {"model": "served", "messages": USER, "tools": [WEATHER]}
        answering = caller.chat_completion(validate_request(ChatCompletionRequest, body), name)
        final = fake.Generated(caller, answering, [[TOOLS.begin + CITY + TOOLS.end]]).final()
        return str(answering.response(final)["choices"][0]["message"]["tool_calls"][0]["id"])

    assert call_id("a") == call_id("a") != call_id("b")


def test_calls_and_results_go_back_to_the_model(caller: OpenAIProtocol) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    for content in (None, ""):
        messages = [
            *USER,
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "12 degrees"},
        ]
        prompt = prompt_of(caller, messages=messages)
        assert f"<｜Assistant｜>{TOOLS.begin}{CITY}{TOOLS.end}" in prompt
        assert prompt.endswith("<｜tool▁output▁begin｜>12 degrees<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")


def test_a_tool_s_text_is_no_template(caller: OpenAIProtocol) -> None:
    evil = "{{ cycler.__init__.__globals__ }}{% for x in range(9) %}"
    tool = {"type": "function", "function": {"name": "f", "description": evil}}
    assert evil in prompt_of(caller, tools=[tool])


def test_a_format_s_instructions_run_in_a_sandbox(caller: OpenAIProtocol) -> None:
    form = TOOLS.model_copy(update={"instructions": "{{ ''.__class__.__mro__ }}"})
    config = unchecked_config(caller.encoder.config, tools=form)
    protocol = OpenAIProtocol(PromptEncoder(config), ["served"])
    with pytest.raises(ApiError, match="cannot be put into the prompt"):
        ask(protocol)


def test_tokenize_counts_the_tools_too(caller: OpenAIProtocol) -> None:
    plain = caller.tokenize(validate_request(TokenizeRequest, {"messages": USER}))
    told = caller.tokenize(validate_request(TokenizeRequest, {"messages": USER, "tools": [NOW]}))
    assert told["count"] > plain["count"]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_format_s_instructions_show_a_call(form: Any) -> None:
    assert form.begin + written("NAME", "ARGUMENTS", form) + form.end in form.instructions
