"""The reader of server-sent events against the rules of the HTML standard."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.protocol.sse import MAX_EVENT_CHARACTERS, EventTooLongError, read_events


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data: a\r\rdata: b\n\n", ["a", "b"]),
        (b": keep-alive\n\n: again\n\ndata: a\n\n", ["a"]),
        (b"data: a\ndata: b\ndata:\n\n", ["a\nb\n"]),
        (b"data:a\n\ndata:  a\n\n", ["a", " a"]),
        (b"event: message\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: a\n\ndata: cut off\n", ["a"]),
        (b"data: a\n\ndata: cut off", ["a"]),
        ("data: ä\u2028ö\n\n".encode(), ["ä\u2028ö"]),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"<html>no events</html>\n\n", []),
        (b"", []),
    ],
)
def test_the_events_of_a_body(body: bytes, events: list[str]) -> None:
    assert list(read_events([body])) == events
    assert list(read_events([body[i : i + 1] for i in range(len(body))])) == events


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(lines.filter(bool)), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(1, 7), min_size=1))
def test_events_do_not_depend_on_the_pieces(events: list[str], end: str, sizes: list[int]) -> None:
    body = "".join(f": comment{end}data: {event}{end}{end}" for event in events) + f"data: [DONE]{end}{end} "
    rest, chunks = body.encode(), []
    while rest:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(rest[:size])
        rest = rest[size:]
    assert list(read_events(chunks)) == [*events, "[DONE]"]


def test_an_event_without_end_is_refused() -> None:
    endless = itertools.repeat(b"x" * (MAX_EVENT_CHARACTERS // 50))
    with pytest.raises(EventTooLongError):
        next(read_events(endless))
