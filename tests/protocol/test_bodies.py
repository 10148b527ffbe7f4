"""What a body costs, whatever it holds: no more memory than a few dozen times its size, and a short answer."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from pydantic import ValidationError

from npu_zoo.protocol.bodies import MAX_PARTS, parse_request
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.fields import MAX_NAMES
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest

SIZE = 2**17
GROWTH = 24
LONGEST = 1000
CHAT = '{"model": "m", "messages": [{"role": "user", "content": "x"}], '
NAMES = ",".join(f'"{number:06}": []' for number in range(SIZE // 12))
LONG = "a" * SIZE


def many(before: str, entry: str, after: str) -> str:
    return before + ",".join([entry] * (SIZE // (len(entry) + 1))) + after


FAULTY: dict[str, tuple[Any, str]] = {
    "numbers as messages": (ChatCompletionRequest, many('{"model": "m", "messages": [', "0", "]}")),
    "lists as messages": (ChatCompletionRequest, many('{"model": "m", "messages": [', "[]", "]}")),
    "messages without content": (ChatCompletionRequest, many('{"messages": [', '{"role": "user"}', "]}")),
    "numbers as parts": (ChatCompletionRequest, many('{"messages": [{"role": "user", "content": [', "0", "]}]}")),
    "numbers as calls": (
        ChatCompletionRequest,
        many('{"messages": [{"role": "assistant", "tool_calls": [', "0", "]}]}"),
    ),
    "numbers as stop strings": (ChatCompletionRequest, many(CHAT + '"stop": [', "0", "]}")),
    "stop strings": (ChatCompletionRequest, many(CHAT + '"stop": [', '"ab"', "]}")),
    "numbers as tools": (ChatCompletionRequest, many(CHAT + '"tools": [', "0", "]}")),
    "texts as stop tokens": (ChatCompletionRequest, many(CHAT + '"stop_token_ids": [', '""', "]}")),
    "texts as modalities": (ChatCompletionRequest, many(CHAT + '"modalities": [', '""', "]}")),
    "lists as biases": (ChatCompletionRequest, CHAT + f'"logit_bias": {{{NAMES}}}}}'),
    "lists as template arguments": (ChatCompletionRequest, CHAT + f'"chat_template_kwargs": {{{NAMES}}}}}'),
    "unknown fields": (ChatCompletionRequest, CHAT + NAMES + "}"),
    "a long field": (ChatCompletionRequest, CHAT + f'"{LONG}": 0}}'),
    "a long field below": (ChatCompletionRequest, CHAT + f'"stream_options": {{"{LONG}": 0}}}}'),
    "a long name of a bias": (ChatCompletionRequest, CHAT + f'"logit_bias": {{"{LONG}": []}}}}'),
    "a long text as a number": (ChatCompletionRequest, CHAT + f'"n": "{LONG}"}}'),
    "negative ids": (CompletionRequest, many('{"model": "m", "prompt": [', "-1", "]}")),
    "empty prompts of ids": (CompletionRequest, many('{"model": "m", "prompt": [', "[]", "]}")),
    "numbers among prompts": (CompletionRequest, many('{"model": "m", "prompt": ["a",', "1", "]}")),
    "choices": (CompletionRequest, many('{"structured_outputs": {"choice": [', "0", "]}}")),
    "texts as ids": (DetokenizeRequest, many('{"tokens": [', '""', "]}")),
}
UNREADABLE: dict[str, tuple[Any, str]] = {
    "a long name with half a character": (ChatCompletionRequest, CHAT + f'"metadata": {{"{LONG}": "\\ud800"}}}}'),
    "a long name of NaN": (ChatCompletionRequest, CHAT + f'"metadata": {{"{LONG}": NaN}}}}'),
    "NaN": (DetokenizeRequest, many('{"tokens": [', "NaN", "]}")),
    "NaN and numbers": (DetokenizeRequest, many('{"tokens": [NaN,', "1", "]}")),
    "deep lists": (DetokenizeRequest, '{"tokens": ' + "[" * SIZE),
    "deep texts": (ChatCompletionRequest, many(CHAT + '"metadata": {"a": ' + "[" * 80, '"ab"', "]" * 80 + "}}")),
}


@pytest.mark.parametrize(("model", "text"), [*FAULTY.values(), *UNREADABLE.values()], ids=[*FAULTY, *UNREADABLE])
def test_a_faulty_body_is_refused_at_little_cost(model: Any, text: str) -> None:
    body = text.encode()
    with pytest.raises(ApiError):  # what is made once is not the body's
        parse_request(model, b'{"model": 0}')
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            parse_request(model, body)
        assert tracemalloc.get_traced_memory()[1] < GROWTH * SIZE
    finally:
        tracemalloc.stop()
    assert caught.value.status == 400
    assert len(json.dumps(caught.value.body())) < LONGEST


@pytest.mark.parametrize(("model", "text"), FAULTY.values(), ids=FAULTY)
def test_few_faults_are_looked_for(model: Any, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(json.loads(text))
    assert caught.value.error_count() <= 3


def test_values_of_an_object_are_all_looked_at_where_they_are_few() -> None:
    body = {"model": "m", "prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MAX_NAMES)), 1)}
    assert len(parse_request(CompletionRequest, json.dumps(body).encode()).logit_bias or ()) == MAX_NAMES


@pytest.mark.parametrize("text", ["[{:", '\\"[{:', "\\\\", '\\\\\\":', "\\n[\\u005b"])
def test_parts_in_texts_do_not_count(text: str) -> None:
    body = f'{{"model": "m", "prompt": "{text * (MAX_PARTS // 2)}"}}'
    assert parse_request(CompletionRequest, body.encode()).prompt == json.loads(f'"{text}"') * (MAX_PARTS // 2)


@pytest.mark.parametrize("part", ["[]", "{}", '"a": 0', '[""]', '["\\\\"]'])
def test_too_many_parts_are_refused_before_they_are_parsed(part: str) -> None:
    brackets = "{}" if ":" in part else "[]"
    body = brackets[0] + ",".join([part] * (MAX_PARTS + 1)) + brackets[1]
    with pytest.raises(ApiError, match=f"more than {MAX_PARTS} lists, objects and names"):
        parse_request(CompletionRequest, body.encode())


def test_many_results_of_many_calls_are_matched_by_name() -> None:
    count = 2000
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(count)]
    results = [{"role": "tool", "tool_call_id": f"c{count - 1}", "content": "r"}] * count
    messages = [{"role": "assistant", "tool_calls": calls}, *results]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    assert len(parse_request(ChatCompletionRequest, body).messages) == count + 1
