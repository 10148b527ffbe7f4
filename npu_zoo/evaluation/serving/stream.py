"""The answer in a streamed response, read after it has come.

While a response comes, only its pieces and the times of their arrival are kept, so that reading JSON delays no
timestamp, neither its own nor another request's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from npu_zoo.evaluation.serving.observation import Failure
from npu_zoo.protocol.errors import error_text
from npu_zoo.protocol.sse import EventReader, EventTooLongError

DONE = "[DONE]"
_SHOWN = 300


class Piece(NamedTuple):
    """A part of a body, and when it came."""

    at: float
    data: bytes


@dataclass
class Answer:
    """What the events of a stream have said.

    Attributes:
        arrivals: when each event with a choice came.
        characters: how much text each of them brought.
        finish_reason: the server's.
        done: whether the stream said that it is over.
        usage: the server's last count.
        failure: what is wrong with the stream.
    """

    arrivals: list[float] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False
    usage: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def whole(self) -> bool:
        """Whether the answer has come to its end."""
        return (self.done or self.finish_reason is not None) and bool(self.arrivals)

    def tokens(self, name: str) -> int | None:
        """One of the server's counts; None where it gives none."""
        count = self.usage.get(name)
        return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None

    def take(self, at: float, data: str) -> None:
        """Take an event's data."""
        if data == DONE:
            self.done = True
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            self.failure = Failure(kind="malformed", message=f"an event is no JSON: {shown(data, 80)}")
            return
        if not isinstance(event, dict):
            self.failure = Failure(kind="malformed", message=f"an event is no object: {shown(data, 80)}")
        elif event.get("error"):
            self.failure = Failure(kind="error", message=shown(error_text(event)) or "an error without a message")
        else:
            self._take_chunk(at, event)

    def _take_chunk(self, at: float, event: Mapping[str, Any]) -> None:
        if isinstance(usage := event.get("usage"), dict):
            self.usage = usage
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        self.arrivals.append(at)
        self.characters.append(_text_length(choices[0]))
        if isinstance(reason := choices[0].get("finish_reason"), str):
            self.finish_reason = reason


def read_answer(pieces: Iterable[Piece]) -> Iterator[Answer]:
    """The answer as far as it has come after each event, so that a reader may pause between them."""
    answer, reader = Answer(), EventReader()
    yield answer
    try:
        for piece in pieces:
            for data in reader.feed(piece.data):
                answer.take(piece.at, data)
                if answer.failure or answer.done:
                    return
                yield answer
    except EventTooLongError:
        answer.failure = Failure(kind="malformed", message="an event does not end")


def shown(text: str, most: int = _SHOWN) -> str:
    """A server's words in one line without control characters, and not too many of them."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    return text if len(text) <= most else text[:most] + "…"


def _text_length(choice: Mapping[str, Any]) -> int:
    """Characters of a completion's or a chat's part: text, reasoning, and the calls of tools."""
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else choice
    said = [parts.get(name) for name in ("text", "content", "reasoning_content", "reasoning", "refusal")]
    return sum(len(text) for text in (*said, *_tool_texts(parts.get("tool_calls"))) if isinstance(text, str))


def _tool_texts(calls: Any) -> Iterator[Any]:
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield from (function.get("name"), function.get("arguments"))
