"""Finds tool calls in a model's text while it is being generated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from npu_zoo.core.model_config import ToolFormat
from npu_zoo.protocol.reasoning import overlap

_LONGEST_NAME = 256
_MARKS = re.compile(r'["{}]')
_STRING_PART = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SPACE = re.compile(r"\s*")

_State = Literal[
    "text", "calls", "opening", "name", "object", "brace", "arguments", "closing", "closed", "called", "ended"
]


@dataclass(frozen=True)
class CallPiece:
    """What is new of a call.

    Attributes:
        index: of the call in its answer.
        name: stands in a call's first piece alone.
        arguments: JSON text, as the model has written it.
    """

    index: int
    name: str | None = None
    arguments: str = ""


class ToolCallReader:
    """Tells tool calls from content in a text that comes in pieces; how it is cut makes no difference.

    A call counts once it is closed and its arguments are a JSON object. What looks like one and is not is content, all
    of it. White space between the format's parts does not matter.

    Args:
        eager: gives calls as they come, also one that the text's end cuts off; for calls that a grammar enforces.
        parallel: whether an answer may hold several calls; otherwise those after the first are left out.

    Attributes:
        num_calls: how many were given so far.
    """

    def __init__(self, tool_format: ToolFormat, *, eager: bool = False, parallel: bool = True) -> None:
        self.num_calls = 0
        self._format = tool_format
        self._eager = eager
        self._parallel = parallel
        self._state: _State = "text"
        self._text = ""  # what was not given yet
        self._at = 0  # how much of it was read
        self._called = False  # whether a call stands between the last begin and here
        self._index = 0
        self._scanner = _ObjectScanner()
        self._pieces: list[CallPiece] = []  # of the call that is being read
        self._content = ""
        self._calls: list[CallPiece] = []

    @property
    def held(self) -> int:
        """Characters that were fed and are still neither content nor part of a call."""
        return len(self._text)

    def feed(self, text: str) -> tuple[str, list[CallPiece]]:
        """The content and the calls that the next piece makes certain."""
        self._text += text
        while self._step():
            pass
        if self._gives_early:
            self._give()
        return self._taken()

    def finish(self) -> tuple[str, list[CallPiece]]:
        """What was held back when the text ended; a part of a call that was enforced is no content."""
        if not (self._eager and (self._state != "text" or self.num_calls == 0)):
            self._content += self._text
        self._text = ""
        return self._taken()

    @property
    def _gives_early(self) -> bool:
        return self._eager and self._state in ("arguments", "closing", "closed")

    def _taken(self) -> tuple[str, list[CallPiece]]:
        taken = self._content, self._calls
        self._content, self._calls = "", []
        return taken

    def _step(self) -> bool:
        """Read on; False where the text does not say yet how it goes on."""
        if self._state == "text":
            return self._read_text()
        if self._state == "name":
            return self._read_name()
        if self._state == "brace":
            return self._begin_arguments()
        if self._state == "arguments":
            return self._read_arguments()
        if self._state == "called":
            return self._end_call()
        if self._state == "ended":
            return self._end_calls()
        return self._expect(self._expected())

    def _expected(self) -> list[tuple[str, _State]]:
        """What may come next, and the state after it."""
        form = self._format
        if self._state == "calls":
            ending: list[tuple[str, _State]] = [(form.end, "ended")] if self._called else []
            return [(form.call_begin, "opening"), *ending]
        if self._state == "opening":
            return [(form.before_name, "name")]
        if self._state == "object":
            return [("{", "brace")]
        return [(form.after_arguments, "closed")] if self._state == "closing" else [(form.call_end, "called")]

    def _expect(self, expected: Sequence[tuple[str, _State]]) -> bool:
        self._at = _after_space(self._text, self._at)
        rest = self._text[self._at :]
        for literal, state in expected:
            if rest.startswith(literal.strip()):
                self._at, self._state = self._at + len(literal.strip()), state
                return True
        return False if any(literal.strip().startswith(rest) for literal, _ in expected) else self._give_up()

    def _read_text(self) -> bool:
        begin = self._format.begin
        place = self._text.find(begin)
        given = len(self._text) - overlap(self._text, begin) if place < 0 else place
        self._content += self._text[:given]
        self._text, self._at = self._text[given:], 0
        if place >= 0:
            self._at, self._state, self._called = len(begin), "calls", False
        return place >= 0

    def _read_name(self) -> bool:
        marker = self._format.before_arguments.strip() or self._format.before_arguments
        place = self._text.find(marker, self._at)
        name = self._text[self._at : place if place >= 0 else None].strip()
        if len(name) > _LONGEST_NAME + (len(marker) if place < 0 else 0) or (place >= 0 and not name):
            return self._give_up()
        if place >= 0:
            self._pieces = [CallPiece(self._index, name)]
            self._at, self._state = place + len(marker), "object"
        return place >= 0

    def _begin_arguments(self) -> bool:
        self._pieces.append(CallPiece(self._index, arguments="{"))
        self._scanner, self._state = _ObjectScanner(), "arguments"
        return True

    def _read_arguments(self) -> bool:
        end = self._scanner.scan(self._text, self._at)
        self._pieces.append(CallPiece(self._index, arguments=self._text[self._at : end]))
        self._at = end
        if self._scanner.depth == 0:
            self._state = "closing"
        return self._scanner.depth == 0

    def _end_call(self) -> bool:
        if not self._eager and not _is_object("".join(piece.arguments for piece in self._pieces)):
            return self._give_up()
        self._give()
        self._index += 1
        self._called, self._state = True, "calls"
        return True

    def _end_calls(self) -> bool:
        self._text, self._at, self._state = self._text[self._at :], 0, "text"
        return True

    def _give(self) -> None:
        """Give what was read of a call."""
        if self._parallel or self._index == 0:
            self.num_calls += sum(piece.name is not None for piece in self._pieces)
            self._calls += self._pieces
        self._pieces = []
        self._text, self._at = self._text[self._at :], 0

    def _give_up(self) -> bool:
        """What was read since something was given is content."""
        self._content += self._text[: self._at]
        self._text, self._at, self._state, self._pieces = self._text[self._at :], 0, "text", []
        return True


class _ObjectScanner:
    """Finds the end of a JSON object behind its first brace, however it comes in pieces."""

    def __init__(self) -> None:
        self.depth = 1
        self._in_string = False

    def scan(self, text: str, at: int) -> int:
        """Read on from a place; how far the object was read, which is its end once ``depth`` is 0."""
        while self.depth:
            if self._in_string:
                found = _STRING_PART.match(text, at)
                at = found.end() if found else at
                if text[at : at + 1] != '"':  # the text ends here, perhaps with half an escape
                    return at
                self._in_string, at = False, at + 1
            mark = _MARKS.search(text, at)
            if mark is None:
                return len(text)
            at = mark.end()
            self._in_string = mark[0] == '"'
            self.depth += {"{": 1, "}": -1}.get(mark[0], 0)
        return at


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
