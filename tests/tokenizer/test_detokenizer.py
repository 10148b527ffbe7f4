from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.engine.detokenizer import IncrementalDetokenizer
from npu_zoo.engine.tokenizer import Tokenizer

BOS, EOT, FIM_BEGIN = "<｜begin▁of▁sentence｜>", "<|EOT|>", "<｜fim▁begin｜>"
ALPHABET = "abc é🚀數"


class Pieces:
    """A tokenizer whose token n is the n-th given piece of bytes."""

    strips_leading_space = False

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        return self.pieces[token_id]


def detokenize(pieces: Sequence[bytes], **kwargs: object) -> tuple[IncrementalDetokenizer, list[str]]:
    detokenizer = IncrementalDetokenizer(Pieces(pieces), **kwargs)  # type: ignore[arg-type]
    return detokenizer, [*map(detokenizer.append, range(len(pieces))), detokenizer.finish()]


def naive(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The stop string whose end comes first, of those the one that begins first."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, start, stop = min(found)
    return text[: end if include else start], stop


@st.composite
def tokenised(draw: st.DrawFn, text: st.SearchStrategy[str]) -> tuple[str, list[bytes]]:
    """A text and its bytes cut anywhere, inside characters too."""
    whole = draw(text)
    data = whole.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return whole, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(case=tokenised(st.text(ALPHABET, max_size=30)))
def test_deltas_join_to_the_text_and_split_no_character(case: tuple[str, list[bytes]]) -> None:
    text, pieces = case
    detokenizer, deltas = detokenize(pieces)
    assert "".join(deltas) == text == detokenizer.text
    assert not any("\ufffd" in delta for delta in deltas)


@given(pieces=st.lists(st.binary(max_size=5)))
def test_deltas_join_to_the_lossy_decoding_of_any_bytes(pieces: list[bytes]) -> None:
    assert "".join(detokenize(pieces)[1]) == b"".join(pieces).decode("utf-8", "replace")


@given(ids=st.lists(st.integers(0, 400)), skip=st.booleans())
def test_deltas_join_to_decode_for_any_ids(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    assert "".join([*map(detokenizer.append, ids), detokenizer.finish()]) == tokenizer.decode(ids, skip)


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    data = "🚀!".encode()
    _, deltas = detokenize([data[i : i + 1] for i in range(len(data))])
    assert deltas == ["", "", "", "🚀", "!", ""]
    _, deltas = detokenize([data[:2]])
    assert deltas == ["", "\ufffd"]


def test_added_tokens_are_literal_and_special_ones_skipped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"grün{FIM_BEGIN}{EOT}x")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(map(detokenizer.append, ids)) == f"grün{FIM_BEGIN}x"
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(map(detokenizer.append, ids)) == f"{BOS}grün{FIM_BEGIN}{EOT}x"


# Stop strings


@given(
    case=tokenised(st.text("ab🚀", max_size=20)),
    stops=st.lists(st.text("ab🚀", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_tokenisation(
    case: tuple[str, list[bytes]], stops: list[str], include: bool
) -> None:
    text, pieces = case
    detokenizer, deltas = detokenize(pieces, stop_strings=stops, include_stop=include)
    assert ("".join(deltas), detokenizer.stopped_on) == naive(text, stops, include)
    assert detokenizer.text == "".join(deltas)


@given(case=tokenised(st.text("ab", max_size=20)), stop=st.text("ab", min_size=1, max_size=4))
def test_only_what_may_become_a_stop_string_is_held_back(case: tuple[str, list[bytes]], stop: str) -> None:
    _, pieces = case
    detokenizer, seen = IncrementalDetokenizer(Pieces(pieces), stop_strings=[stop]), ""  # type: ignore[arg-type]
    for number, piece in enumerate(pieces):
        detokenizer.append(number)
        seen += piece.decode()
        if detokenizer.stopped_on is not None:
            break
        held = seen.removeprefix(detokenizer.text)
        assert stop.startswith(held)
        assert len(held) < len(stop)
        longer = [n for n in range(len(held) + 1, len(stop)) if seen.endswith(stop[:n])]
        assert longer == []


def test_the_stop_string_that_ends_first_counts() -> None:
    detokenizer, deltas = detokenize([b"xab", b"cd"], stop_strings=["abcd", "bc"])
    assert (deltas, detokenizer.stopped_on) == (["x", "a", ""], "bc")
    detokenizer, deltas = detokenize([b"xabcd"], stop_strings=["cd", "abcd"])
    assert ("".join(deltas), detokenizer.stopped_on) == ("x", "abcd")


def test_nothing_comes_after_a_stop_string() -> None:
    detokenizer, deltas = detokenize([b"a;b", b"c", "é".encode()[:1]], stop_strings=[";"])
    assert (deltas, detokenizer.text) == (["a", "", "", ""], "a")


def test_what_was_held_back_comes_at_the_end() -> None:
    detokenizer, deltas = detokenize([b"a\n", b"\n"], stop_strings=["\n\n\n"])
    assert (deltas, detokenizer.stopped_on) == (["a", "", "\n\n"], None)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    detokenizer, deltas = detokenize([b";", b"a;", b"b", b";c"], stop_strings=[";"], min_tokens=2)
    assert (deltas, detokenizer.stopped_on) == ([";", "a;", "b", "", ""], ";")


@pytest.mark.slow
def test_the_cost_of_a_token_does_not_grow() -> None:
    detokenizer = IncrementalDetokenizer(Pieces([b"word "]), stop_strings=["never", "word word;"])  # type: ignore[arg-type]

    def fastest(rounds: int) -> float:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(1000):
                detokenizer.append(0)
            times.append(time.perf_counter() - start)
        return min(times)

    early = fastest(5)
    for _ in range(200_000):
        detokenizer.append(0)
    assert fastest(5) < 5 * early
