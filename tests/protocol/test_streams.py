"""A stream's chunks, put together, are the whole answer, however the states come."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.plugins.deepseek_v3.prompts import TOOLS
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest

USER = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CALL = TOOLS.call_begin + TOOLS.before_name + "f" + TOOLS.before_arguments + '{"a": "é}"}' + TOOLS.after_arguments
CALLS = f"{TOOLS.begin}{CALL}{TOOLS.call_end}\n{CALL}{TOOLS.call_end}{TOOLS.end}"
PIECES = [
    "<think>",
    "</think>",
    "</thi",
    "é",
    "\N{ROCKET}",
    " a",
    "\n",
    "word",
    CALLS,
    CALLS[:90],
    TOOLS.begin,
    "<｜tool",
]

texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
finishes = st.sampled_from(["stop", "length"])


def chat(protocol: OpenAIProtocol, **fields: Any) -> Any:
    body = {"model": "served", "messages": USER, "stream": True, "stream_options": {"include_usage": True}, **fields}
    return protocol.chat_completion(validate_request(ChatCompletionRequest, body), "r")


def completion(protocol: OpenAIProtocol, **fields: Any) -> Any:
    body = {"model": "served", "stream": True, "stream_options": {"include_usage": True}, **fields}
    return protocol.completion(validate_request(CompletionRequest, body), "r")


def draw_states(data: st.DataObject, generated: Any, index: int) -> list[Any]:
    """Some of a request's states, in order; each answer goes on by any number of tokens, and all end."""
    lengths = [len(ids) + 1 for ids in generated.ids[index]]
    steps = data.draw(st.lists(st.tuples(*(st.integers(0, 9) for _ in lengths)), max_size=12))
    counts, found = [0] * len(lengths), []
    for step in steps:
        counts = [min(count + more, last) for count, more, last in zip(counts, step, lengths, strict=True)]
        found.append(generated.state(index, counts))
    return [*found, generated.state(index, lengths)]


@pytest.mark.parametrize("choice", ["auto", "required"])
@given(data=st.data(), row=st.lists(texts, min_size=1, max_size=2), finish=finishes, opened=st.booleans())
def test_a_chat_s_chunks_are_its_answer(
    thinker: OpenAIProtocol,
    fake: ModuleType,
    data: st.DataObject,
    row: list[str],
    finish: str,
    opened: bool,
    choice: str,
) -> None:
    fields = {"n": len(row), "logprobs": True, "top_logprobs": 1, "tools": [WEATHER], "tool_choice": choice}
    answering = chat(thinker, **fields)
    generated = fake.Generated(thinker, answering, [row], finish=finish, opened=opened)
    chunks = [chunk for state in draw_states(data, generated, 0) for chunk in answering.chunks(0, state)]
    last = answering.last_chunks()
    whole = chat(thinker, **fields).response(generated.final())
    assert fake.join_chat(chunks) == fake.whole_chat(whole)
    assert [chunk["usage"] for chunk in [*chunks, *last]] == [None] * len(chunks) + [whole["usage"]]
    assert {chunk["id"] for chunk in [*chunks, *last]} == {whole["id"]}


@given(
    data=st.data(), rows=st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=2), echo=st.booleans()
)
def test_a_completion_s_chunks_are_its_answer(
    coder: OpenAIProtocol, fake: ModuleType, data: st.DataObject, rows: list[list[str]], echo: bool
) -> None:
    prompts = ["def f():", "é"][: len(rows)]
    answering = completion(coder, prompt=prompts, n=2, logprobs=1, echo=echo)
    generated = fake.Generated(coder, answering, rows)
    chunks = []
    for index in range(len(rows)):
        chunks += [chunk for state in draw_states(data, generated, index) for chunk in answering.chunks(index, state)]
    whole = completion(coder, prompt=prompts, n=2, logprobs=1, echo=echo).response(generated.final())
    for choice in fake.checked_completion(whole)["choices"]:
        parts = [
            c for chunk in chunks for c in fake.checked_completion(chunk)["choices"] if c["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
    (usage,) = answering.last_chunks()
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


@given(text=texts, opened=st.booleans())
def test_logprobs_come_with_the_text_that_they_are_of(
    thinker: OpenAIProtocol, fake: ModuleType, text: str, opened: bool
) -> None:
    """The tokens that were given by any moment never say more than the text that was, markers included."""
    answering = chat(thinker, logprobs=True)
    generated = fake.Generated(thinker, answering, [[text]], opened=opened)
    told, given_bytes = "", b""
    for state in generated.every_state(0):
        for chunk in answering.chunks(0, state):
            (choice,) = chunk["choices"]
            told += choice["delta"].get("reasoning_content", "") + choice["delta"].get("content", "")
            given_bytes += b"".join(bytes(e["bytes"]) for e in (choice["logprobs"] or {"content": []})["content"])
        visible = given_bytes.decode("utf-8", "ignore").replace("<think>", "").replace("</think>", "")
        if "think" not in text.replace("<think>", "").replace("</think>", "") and text.count("</think>") == 0:
            assert len(visible.lstrip()) <= len(told) + len(text) - len(text.lstrip())
    assert given_bytes.decode() == text


def test_the_first_chunk_has_the_role_and_the_last_one_the_end(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = chat(coder, n=2)
    generated = fake.Generated(coder, answering, [["Hello", "wörld"]])
    chunks = [chunk for state in generated.every_state(0) for chunk in answering.chunks(0, state)]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order), "answers take turns"


def test_a_state_that_brings_nothing_new_gives_no_chunk(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = chat(coder)
    generated = fake.Generated(coder, answering, [["Hello"]])
    state, final = generated.state(0, [2]), generated.final()[0]
    assert len(answering.chunks(0, state)) == 2
    assert answering.chunks(0, state) == []
    assert len(answering.chunks(0, final)) == 2
    assert answering.chunks(0, final) == []


def test_the_usage_so_far_is_in_every_chunk_that_asks_for_it(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = chat(coder, stream_options={"continuous_usage_stats": True})
    generated = fake.Generated(coder, answering, [["Hello there"]])
    chunks = [chunk for state in generated.every_state(0) for chunk in answering.chunks(0, state)]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(generated.ids[0][0])
    assert len(answering.last_chunks()) == 1


def test_no_usage_comes_unasked(coder: OpenAIProtocol, fake: ModuleType) -> None:
    answering = chat(coder, stream_options=None)
    chunks = answering.chunks(0, fake.Generated(coder, answering, [["Hello"]]).final()[0])
    assert all("usage" not in chunk for chunk in chunks)
    assert answering.last_chunks() == []


def test_reasoning_tokens_are_counted_where_the_marker_is_a_token(thinker: OpenAIProtocol, fake: ModuleType) -> None:
    answering = chat(thinker)
    whole = answering.response(fake.Generated(thinker, answering, [["a</think>b"]], opened=True).final())
    tokenizer = thinker.encoder.need_tokenizer("tests")
    countable = len(tokenizer.encode("</think>", False)) == 1
    assert ("completion_tokens_details" in whole["usage"]) == countable
