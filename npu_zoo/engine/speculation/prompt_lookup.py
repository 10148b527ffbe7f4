"""Drafts from a sequence's own text: what followed the last time that its last few tokens stood there.

As in prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): it costs no model, and pays where outputs
repeat their prompt or themselves, such as edits of code.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer


class NgramIndex:
    """Where each n-gram of a growing list of tokens occurred last. A token costs the same wherever it stands.

    Args:
        shortest, longest: n-grams to know, in tokens.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(shortest, longest + 1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, token_ids: SequenceOf[int]) -> None:
        """Take the tokens that are new since the last call; only what a token follows is looked up later."""
        for end in range(max(self._indexed, 1), len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._indexed = len(token_ids)

    def follow(self, token_ids: SequenceOf[int], count: int) -> list[int]:
        """What followed the longest known n-gram that the tokens end with, ``count`` tokens of it.

        Where that reaches the end it goes on with itself, so a text that repeats a single token is guessed as far.
        """
        self.extend(token_ids)
        for size in reversed(self._sizes):
            begin = self._ends.get(tuple(token_ids[-size:])) if size <= len(token_ids) else None
            if begin is not None:
                period = len(token_ids) - begin
                return [token_ids[begin + place % period] for place in range(count)]
        return []


class PromptLookupProposer(Proposer):
    """Looks n-grams up in each sequence's prompt and output.

    Args:
        shortest, longest: n-grams to look up, in tokens; the longest that is found counts.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._indices: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[list[int]]:
        """See :meth:`Proposer.propose`."""
        return [self._index(request.sequence).follow(request.sequence.token_ids, request.limit) for request in requests]

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex(self._shortest, self._longest)
        return index
