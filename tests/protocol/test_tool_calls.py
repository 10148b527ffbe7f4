"""Tool calls are found in text, and what only looks like one stays content."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.model_config import ToolFormat
from npu_zoo.plugins.deepseek_v3.prompts import TOOLS, V31_TOOLS
from npu_zoo.protocol.messages import Tool
from npu_zoo.protocol.tool_calls import ToolCallReader

FORMATS = {"v3": TOOLS, "v3.1": V31_TOOLS}
TRICKY = '{"a": "}\\"{\\\\", "b": {"c": [1, "<｜tool▁call▁end｜>"]}}'
Found = tuple[str, list[tuple[str, str]]]


def call(form: ToolFormat, name: str, arguments: str) -> str:
    return (
        f"{form.call_begin}{form.before_name}{name}{form.before_arguments}{arguments}{form.after_arguments}"
        f"{form.call_end}"
    )


def calls(form: ToolFormat, *pairs: tuple[str, str]) -> str:
    return form.begin + form.between.join(call(form, *pair) for pair in pairs) + form.end


def read(form: ToolFormat, parts: list[str], **options: bool) -> Found:
    reader = ToolCallReader(form, **options)
    found = [*(reader.feed(part) for part in parts), reader.finish()]
    assert reader.held == 0
    joined: dict[int, list[str]] = {}
    for piece in (piece for _, pieces in found for piece in pieces):
        if piece.name is not None:
            assert piece.index not in joined, "a call's name comes once"
            joined[piece.index] = [piece.name, ""]
        joined[piece.index][1] += piece.arguments
    assert reader.num_calls == len(joined)
    assert list(joined) == list(range(len(joined)))
    return "".join(content for content, _ in found), [(name, arguments) for name, arguments in joined.values()]


def cuts(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def fragments(form: ToolFormat) -> st.SearchStrategy[str]:
    marks = [form.begin, form.end, form.call_begin, form.call_end, form.before_name, form.before_arguments]
    marks += [
        form.after_arguments,
        form.between,
        call(form, "f", TRICKY),
        call(form, "g", "{}"),
        calls(form, ("f", "{}")),
    ]
    return st.lists(st.sampled_from([*marks, "{", "}", '"', "\\", "text ", "\n", "<｜tool", "f"]), max_size=12).map(
        "".join
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(data=st.data(), eager=st.booleans(), parallel=st.booleans())
def test_pieces_make_no_difference(form: ToolFormat, data: st.DataObject, eager: bool, parallel: bool) -> None:
    text = data.draw(fragments(form))
    options = {"eager": eager, "parallel": parallel}
    places = data.draw(st.lists(st.integers(0, 10_000), max_size=8))
    assert (
        read(form, cuts(text, places), **options) == read(form, [text], **options) == read(form, list(text), **options)
    )


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(data=st.data())
def test_nothing_is_lost(form: ToolFormat, data: st.DataObject) -> None:
    """Content and calls together have every word that was generated outside of the format's own marks."""
    text = data.draw(fragments(form))
    content, found = read(form, [text])
    for word in ("text ", TRICKY):
        assert content.count(word) + sum(arguments.count(word) for _, arguments in found) == text.count(word)
    if not found:
        assert content == text


objects = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=4)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@given(
    before=st.text(),
    pairs=st.lists(st.tuples(st.from_regex(r"\A[a-z_.-]{1,64}\Z"), objects), min_size=1, max_size=4),
    eager=st.booleans(),
)
def test_calls_come_back(form: ToolFormat, before: str, pairs: list[tuple[str, Any]], eager: bool) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in pairs]
    assert read(form, [before + calls(form, *written)], eager=eager) == (before, written)


V3 = FORMATS["v3"]
ONE = call(V3, "f", '{"a": 1}')
MALFORMED = {
    "never closed": V3.begin + ONE[: -len(V3.call_end)],
    "cut in its name": V3.begin + ONE[:30],
    "cut in its arguments": V3.begin + ONE[:-40],
    "no object": calls(V3, ("f", "[1]")),
    "no JSON": calls(V3, ("f", '{"a": nope}')),
    "no name": calls(V3, ("", "{}")),
    "a name without an end": V3.begin + V3.call_begin + V3.before_name + "f" * 1000,
    "no call": V3.begin + V3.end,
    "something else behind the arguments": calls(V3, ("f", '{"a": 1} and more')),
    "deeper than JSON's reader goes": calls(V3, ("f", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_is_content(text: str) -> None:
    assert read(V3, [f"see {text}"]) == (f"see {text}", [])


def test_sound_calls_before_a_malformed_one_count() -> None:
    broken = call(V3, "g", "{nope}")
    content, found = read(V3, [V3.begin + ONE + "\n" + broken + V3.end])
    assert found == [("f", '{"a": 1}')]
    assert content == "\n" + broken + V3.end


def test_white_space_between_the_parts_does_not_matter() -> None:
    loose = V3.begin + "\n" + ONE.replace("{", "\n {").replace("}", "} \n") + "\n\n" + ONE + " \n" + V3.end
    assert read(V3, [loose]) == ("", [("f", '{"a": 1}')] * 2)


def test_text_behind_the_calls_is_content_and_may_hold_more() -> None:
    one = calls(V3, ("f", "{}"))
    assert read(V3, [f"a{one}b{one}c"]) == ("abc", [("f", "{}")] * 2)


def test_one_call_is_all_where_calls_are_not_parallel() -> None:
    assert read(V3, [calls(V3, ("f", "{}"), ("g", "{}"))], parallel=False) == ("", [("f", "{}")])


def test_calls_wait_until_they_are_sound_unless_a_grammar_enforces_them() -> None:
    waits, eager = ToolCallReader(V3), ToolCallReader(V3, eager=True)
    start = V3.begin + ONE[: ONE.index("1")]
    assert waits.feed(start) == ("", [])
    assert waits.held == len(start)
    _, pieces = eager.feed(start)
    assert [piece.name for piece in pieces if piece.name] == ["f"]
    assert "".join(piece.arguments for piece in pieces) == '{"a": '
    assert eager.held == 0


def test_a_call_that_a_limit_cuts_off_stays_a_call_where_a_grammar_enforces_it() -> None:
    assert read(V3, [V3.begin + ONE[: ONE.index("1")]], eager=True) == ("", [("f", '{"a": ')])


def test_the_tools_models_take_what_openai_documents() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
    assert Tool.model_validate(tool).model_dump() == tool
