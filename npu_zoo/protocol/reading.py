"""One answer's text as it grows, told apart into reasoning, content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from npu_zoo.core.engine import CompletionOutput
from npu_zoo.protocol.reasoning import ReasoningSplitter
from npu_zoo.protocol.tool_calls import CallPiece, ToolCallReader


@dataclass
class Piece:
    """What is new of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class AnswerReader:
    """Reads one answer; the pieces, joined, are the same however its text is cut into states.

    Args:
        reasoning: None where the model does not reason.
        tools: None where it was shown no tools.

    Attributes:
        num_calls: tool calls that were found so far.
        finished: whether the answer's end was read.
    """

    def __init__(self, reasoning: ReasoningSplitter | None = None, tools: ToolCallReader | None = None) -> None:
        self.finished = False
        self._reasoning = reasoning
        self._tools = tools
        self._length = 0

    @property
    def num_calls(self) -> int:
        """Tool calls that were found so far."""
        return self._tools.num_calls if self._tools else 0

    @property
    def given(self) -> int:
        """Characters of the answer's text that pieces were made of so far, markers among them."""
        held = [part.held for part in (self._reasoning, self._tools) if part]
        return self._length - sum(held)

    def read(self, answer: CompletionOutput) -> Piece:
        """What is new in a later state of the answer."""
        if self.finished:
            return Piece()
        new, self._length = answer.text[self._length :], len(answer.text)
        piece = Piece()
        reasoning, content = self._reasoning.feed(new) if self._reasoning else ("", new)
        self._take(piece, reasoning, content)
        if answer.finish_reason is not None:
            self.finished = True
            self._finish(piece)
        return piece

    def _finish(self, piece: Piece) -> None:
        if self._reasoning:
            self._take(piece, *self._reasoning.finish())
        if self._tools:
            content, calls = self._tools.finish()
            piece.content += content
            piece.calls += calls

    def _take(self, piece: Piece, reasoning: str, content: str) -> None:
        piece.reasoning += reasoning
        if self._tools and content:
            content, calls = self._tools.feed(content)
            piece.calls += calls
        piece.content += content
