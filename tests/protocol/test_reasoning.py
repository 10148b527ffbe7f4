"""Reasoning is told from the answer as it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.model_config import ReasoningFormat
from npu_zoo.protocol.reasoning import ReasoningSplitter

FORMAT = ReasoningFormat(start="<think>", end="</think>")
pieces = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", "é"]), max_size=10)


def split(parts: list[str], opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(FORMAT, opened)
    found = [*(splitter.feed(part) for part in parts), splitter.finish()]
    assert splitter.held == 0
    return "".join(reasoning for reasoning, _ in found), "".join(answer for _, answer in found)


@given(parts=pieces, opened=st.booleans())
def test_pieces_make_no_difference(parts: list[str], opened: bool) -> None:
    text = "".join(parts)
    assert split(parts, opened) == split([text], opened) == split(list(text), opened)


@given(before=st.text(alphabet=" \n"), thought=st.text(), answer=st.text(), opened=st.booleans())
def test_reasoning_and_answer_come_back(before: str, thought: str, answer: str, opened: bool) -> None:
    if "</think>" not in thought:
        assert split([f"{before}<think>{thought}</think>{answer}"], opened) == (thought, answer)


@given(parts=pieces, opened=st.booleans())
def test_a_text_of_one_reasoning_is_split_as_a_whole_text_is(parts: list[str], opened: bool) -> None:
    text = "".join(parts)
    late = not opened and not text.lstrip().startswith("<think>")
    if text.count("</think>") <= 1 and not (late and "</think>" in text):
        assert split([text], opened) == FORMAT.split(text, opened=opened)


SPLITS = [
    (["<think>t</think>a"], False, ("t", "a")),
    (["\n<thi", "nk>\nt\n</thi", "nk>\n\na"], False, ("\nt\n", "\n\na")),
    (["t</think>a"], True, ("t", "a")),
    (["<think>t</think>a"], True, ("t", "a")),
    (["<think>t</thin"], False, ("t</thin", "")),
    (["  <thi"], False, ("", "  <thi")),
    (["  <thi"], True, ("  <thi", "")),
    (["a <think>b"], False, ("", "a <think>b")),
    # What a stream has given as the answer cannot be taken back.
    (["<think>t</think>a</think>b"], False, ("t", "a</think>b")),
    (["a</think>b"], False, ("", "a</think>b")),
]


@pytest.mark.parametrize(("parts", "opened", "expected"), SPLITS)
def test_markers(parts: list[str], opened: bool, expected: tuple[str, str]) -> None:
    assert split(parts, opened) == expected


def test_text_is_given_as_soon_as_it_cannot_be_a_marker() -> None:
    splitter = ReasoningSplitter(FORMAT, opened=True)
    assert splitter.feed("ab<") == ("ab", "")
    assert splitter.feed("c") == ("<c", "")
    assert splitter.feed("</think") == ("", "")
    assert splitter.held == len("</think")
    assert splitter.feed(">d") == ("", "d")
