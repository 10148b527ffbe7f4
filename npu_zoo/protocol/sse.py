"""Server-sent events, as far as a stream of JSON needs them.

Source: the section "Server-sent events" of the HTML standard (html.spec.whatwg.org). The libraries for it come with an
HTTP client of their own, and the base install has none.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

MAX_EVENT_CHARACTERS = 2**20
"""A stream whose event is longer is no stream of tokens."""

_LINE_END = re.compile(r"\r\n|\n|\r")


class EventTooLongError(Exception):
    """An event is longer than :data:`MAX_EVENT_CHARACTERS`."""


class EventReader:
    """Takes a body in any pieces, and gives the data of its events. An event that is cut off is none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._data: list[str] = []
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of each event that a further piece completes.

        Raises:
            EventTooLongError: one does not end.
        """
        text = self._decoder.decode(chunk)
        if text and not self._begun:
            self._begun, text = True, text.removeprefix("\ufeff")
        self._rest += text
        yield from filter(None, map(self._take, self._whole_lines()))
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_CHARACTERS:
            raise EventTooLongError

    def _whole_lines(self) -> Iterator[str]:
        """Lines whose end is there; of a carriage return at the very end a line feed may still come."""
        start = 0
        for end in _LINE_END.finditer(self._rest):
            if end[0] == "\r" and end.end() == len(self._rest):
                break
            yield self._rest[start : end.start()]
            start = end.end()
        self._rest = self._rest[start:]

    def _take(self, line: str) -> str:
        """The event's data where a line ends one that has some."""
        if not line:
            data, self._data = "\n".join(self._data), []
            return data
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return ""


def read_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of every event of a body."""
    reader = EventReader()
    for chunk in chunks:
        yield from reader.feed(chunk)
