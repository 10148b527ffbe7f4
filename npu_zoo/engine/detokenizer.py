"""Turns token ids into text one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npu_zoo.engine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence as its tokens come.

    The deltas of :meth:`append` and :meth:`finish`, joined, are ``tokenizer.decode(ids, skip_special_tokens,
    continues=continues)`` for any ids whatever, up to the stop string. A delta never ends inside a character, and the
    cost of a token does not depend on the text before it.

    The stop string that counts is the one whose last character comes first in the text (of two that end together, the
    longer one); where tokens happen to end makes no difference. Text that may become a stop string is held back.

    Args:
        include_stop: whether the text keeps the stop string; what follows it is dropped either way.
        min_tokens: stop strings are looked for only in the text after this many tokens.
        continues: whether the text goes on from a prompt; otherwise SentencePiece's leading space is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
        include_stop: bool = False,
        *,
        min_tokens: int = 0,
        continues: bool = True,
    ) -> None:
        self.stopped_on: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self._exempt = min_tokens
        self._strip_space = tokenizer.strips_leading_space and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """Everything that was handed out so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def append(self, token_id: int) -> str:
        """The text that the next token makes certain; empty once a stop string was found."""
        data = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
        if self._strip_space and data:
            data, self._strip_space = data.removeprefix(b" "), False
        new = self._decoder.decode(data)
        if self._exempt > 0:
            self._exempt -= 1
            return self._emit(new)
        return self._search(new)

    def finish(self) -> str:
        """The rest of the text: what was held back, and U+FFFD for an incomplete character."""
        delta = self._search(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return delta + self._emit(held)

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _search(self, new: str) -> str:
        if self.stopped_on is not None or not new:
            return ""
        if not self._stop_strings:
            return self._emit(new)
        text = self._held + new
        ends = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.stopped_on = min(ends)
            self._held = ""
            return self._emit(text[: end if self._include_stop else start])
        certain = len(text) - max(_overlap(text, stop) for stop in self._stop_strings)
        self._held = text[certain:]
        return self._emit(text[:certain])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
