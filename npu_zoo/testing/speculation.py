"""Drafts from texts that are known beforehand, right and wrong ones as it is told: what a test verifies."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from npu_zoo.core.config import SpeculationConfig
from npu_zoo.core.errors import UsageError
from npu_zoo.engine.speculation.control import SpeculationControl
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer
from npu_zoo.engine.speculation.speculator import Speculator

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM


class KnownTexts(Proposer):
    """Drafts what follows in a text that begins like the sequence; nothing where there is none.

    Args:
        texts: prompts with their outputs, as token ids.
        right: the share of drafts that are left right, 0 to 1; others are the next token id.
        vocab_size: ids are below it.
    """

    def __init__(self, texts: SequenceOf[SequenceOf[int]], right: float = 1.0, vocab_size: int = 1 << 30) -> None:
        self._texts, self._right, self._vocab_size = [list(text) for text in texts], right, vocab_size
        self._random = random.Random(0)

    def propose(self, requests: SequenceOf[DraftRequest]) -> list[list[int]]:
        """See :meth:`Proposer.propose`."""
        return [self._draft(request.sequence.token_ids, request.limit) for request in requests]

    def _draft(self, token_ids: list[int], limit: int) -> list[int]:
        end = len(token_ids)
        known = next((text for text in self._texts if len(text) > end and text[:end] == token_ids), token_ids)
        return [self._changed(token) for token in known[end : end + limit]]

    def _changed(self, token: int) -> int:
        return token if self._random.random() < self._right else (token + 1) % self._vocab_size


def draft_from(llm: LLM, proposer: Proposer, *, control: SpeculationControl | None = None) -> None:
    """Have an engine take its drafts from a proposer, in every step unless a control says otherwise.

    Raises:
        UsageError: the engine was started without speculation, so that its room is not planned for drafts.
    """
    speculation: SpeculationConfig | None = llm.engine.config.speculation
    if speculation is None:
        raise UsageError("the engine was started without --speculative-method; start it with prompt_lookup")
    control = control or SpeculationControl(adaptive=False)
    llm.engine.speculator = Speculator(proposer, speculation, control)  # type: ignore[attr-defined]
