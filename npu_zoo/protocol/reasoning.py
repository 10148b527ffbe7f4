"""Tells a model's reasoning from its answer while both are being generated."""

from __future__ import annotations

from npu_zoo.core.model_config import ReasoningFormat


class ReasoningSplitter:
    """Splits a text that comes in pieces; how it is cut into pieces makes no difference.

    The first end marker closes the reasoning, since what a stream has given as an answer cannot be taken back; in
    :meth:`ReasoningFormat.split`, which sees whole texts, it is the last one. Text that may become a marker is held.

    Args:
        opened: whether the prompt ends inside the reasoning, so that the text begins there.
    """

    def __init__(self, reasoning: ReasoningFormat, opened: bool) -> None:
        self._format = reasoning
        self._opened = opened
        self._state = "before"
        self._held = ""

    @property
    def held(self) -> int:
        """Characters that were fed and are still neither reasoning nor answer."""
        return len(self._held)

    def feed(self, text: str) -> tuple[str, str]:
        """The reasoning and the answer that the next piece makes certain."""
        self._held += text
        if self._state == "before":
            self._begin()
        reasoning = self._take_reasoning() if self._state == "reasoning" else ""
        return reasoning, self._take_all() if self._state == "answer" else ""

    def finish(self) -> tuple[str, str]:
        """What was held back when the text ended."""
        rest = self._take_all()
        return (rest, "") if self._state == "reasoning" or self._opened else ("", rest)

    def _begin(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._format.start):
            self._held, self._state = begun[len(self._format.start) :], "reasoning"
        elif not self._format.start.startswith(begun):
            self._state = "reasoning" if self._opened else "answer"

    def _take_reasoning(self) -> str:
        reasoning, found, answer = self._held.partition(self._format.end)
        if found:
            self._held, self._state, self._opened = answer, "answer", False
            return reasoning
        certain = len(self._held) - overlap(self._held, self._format.end)
        taken, self._held = self._held[:certain], self._held[certain:]
        return taken

    def _take_all(self) -> str:
        taken, self._held = self._held, ""
        return taken


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of a text that is a proper beginning of a marker."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
