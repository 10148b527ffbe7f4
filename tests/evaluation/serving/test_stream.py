"""Streams as servers send them, and as they should not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.evaluation.serving.stream import Answer, Piece, read_answer

from .stub_server import token, usage


def body(*events: Any) -> bytes:
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def read(*pieces: bytes) -> Answer:
    (*_, answer) = read_answer(Piece(float(number), piece) for number, piece in enumerate(pieces))
    return answer


def delta(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": None}]}


def test_each_event_has_the_time_of_the_piece_that_completed_it() -> None:
    whole = body(token("a"), token("bc"), token("", "stop"), usage(3, 3), "[DONE]")
    first, second = whole[:10], whole[10:]
    answer = read(first, second)
    assert answer.arrivals == [1.0, 1.0, 1.0]
    assert answer.characters == [1, 2, 0]
    assert (answer.finish_reason, answer.done, answer.whole) == ("stop", True, True)
    assert (answer.tokens("prompt_tokens"), answer.tokens("completion_tokens")) == (3, 3)


@given(st.lists(st.integers(1, 40), min_size=1))
def test_how_a_stream_is_cut_changes_its_times_alone(sizes: list[int]) -> None:
    whole = body(token("ä"), token("bc"), token("", "stop"), usage(3, 2), "[DONE]")
    pieces, rest = [], whole
    while rest:
        size = sizes[len(pieces) % len(sizes)]
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    answer = read(*pieces)
    assert answer.characters == [1, 2, 0]
    assert answer.whole
    ends = [whole.index(b"\n\n", whole.index(mark)) + 1 for mark in (b"\\u00e4", b"bc", b"stop")]
    edges = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
    assert answer.arrivals == [next(number for number, edge in enumerate(edges) if edge > end) for end in ends]


@pytest.mark.parametrize(
    ("members", "characters"),
    [
        ({"role": "assistant", "content": ""}, 0),
        ({"role": "assistant", "content": None}, 0),
        ({"content": "abc"}, 3),
        ({"reasoning_content": "ab"}, 2),
        ({"reasoning": "ab"}, 2),
        ({"refusal": "no"}, 2),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, 3),
        ({"tool_calls": "none"}, 0),
    ],
)
def test_what_counts_as_text_of_a_chat(members: dict[str, Any], characters: int) -> None:
    assert read(body(delta(**members))).characters == [characters]


@pytest.mark.parametrize(
    ("events", "kind", "said"),
    [
        ((token(), "{'choices'"), "malformed", "no JSON: {'choices'"),
        ((token(), "[1]"), "malformed", "no object"),
        ((token(), '{"error": {"message": "out of\\n memory"}}'), "error", "out of memory"),
        ((token(), '{"error": "\\u001b[31mbad"}'), "error", "\ufffd[31mbad"),
    ],
)
def test_a_stream_that_goes_wrong(events: tuple[Any, ...], kind: str, said: str) -> None:
    answer = read(body(*events))
    assert answer.failure is not None
    assert answer.failure.kind == kind
    assert said in answer.failure.message
    assert answer.characters == [2]


def test_an_event_without_end_is_malformed() -> None:
    failure = read(*[b"data: " + b"x" * 2**19] * 4).failure
    assert failure is not None
    assert failure.kind == "malformed"


@pytest.mark.parametrize("events", [(), (token(),), ("[DONE]",), (usage(1, 1), "[DONE]")])
def test_a_stream_that_is_no_whole_answer(events: tuple[Any, ...]) -> None:
    assert not read(body(*events)).whole


@pytest.mark.parametrize("count", [None, "3", -1, True, 1.5])
def test_a_count_that_is_none(count: Any) -> None:
    assert read(body({"choices": [], "usage": {"completion_tokens": count}})).tokens("completion_tokens") is None
