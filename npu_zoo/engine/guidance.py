"""Which tokens may come next where an output has to keep a form: masks by llguidance. Needs no torch.

A grammar is compiled once and copied for each sequence that has it. What a grammar may cost is bounded by llguidance's
own limits, at the start as in every step.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from npu_zoo.engine.tokenizer import Tokenizer

_KEPT = 64  # grammars that are kept compiled
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"  # between JSON's tokens; without an end a weak model writes nothing else


class Guide:
    """Where one sequence's output stands in its grammar.

    Args:
        matcher: at the grammar's beginning.
        vocab_size: of the logits.

    Attributes:
        error: why the output cannot go on, such as a limit that the grammar has met; empty as long as it can.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_bytes = -(-vocab_size // 8)
        self._taken = 0

    def advance(self, token_ids: Sequence[int], start: int) -> bool:
        """Take the tokens that are new since the last call; whether nothing can follow them.

        Args:
            token_ids: all of the sequence's.
            start: where the output that keeps the form begins in them.
        """
        for position in range(start + self._taken, len(token_ids)):
            self._taken += 1
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token_ids[position])
        return self._matcher.is_stopped()

    def mask(self) -> bytes:
        """A bit per token id, lowest first: whether it may come next."""
        return self._matcher.compute_bitmask()[: self._num_bytes]

    @property
    def error(self) -> str:
        """Why the output cannot go on; empty where it can."""
        return " ".join(self._matcher.get_error().split())


class GuideMaker:
    """Makes guides for one tokenizer; threads may share it.

    Args:
        tokenizer: whose tokens the masks speak of.
        vocab_size: of the logits; rows beyond the tokenizer's tokens are never allowed.
        stop_token_ids: what may follow a complete output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = sorted(stop_token_ids)
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def make(self, form: StructuredOutputs) -> Guide:
        """A guide at the beginning of an output of this form.

        Raises:
            UsageError: the form cannot be parsed, is not supported or too large, or llguidance is missing.
        """
        with self._lock:
            return Guide(self._matcher(form).deep_copy(), self._vocab_size)

    def _matcher(self, form: StructuredOutputs) -> LLMatcher:
        matcher = self._compiled.get(form)
        if matcher is None:
            matcher = self._compiled[form] = self._compile(form)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(form)
        return matcher

    def _compile(self, form: StructuredOutputs) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise UsageError(
                "structured outputs need llguidance, which is not installed: pip install 'npu-zoo[run]'"
            ) from None
        try:
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._tokens(), _grammar(form), log_level=0, limits=limits)
            matcher.compute_bitmask()  # some faults show when the first token is looked for
        except ValueError as error:
            raise UsageError(f"structured_outputs.{form.kind} cannot be used: {error}") from error
        if matcher.is_error():
            fault = " ".join(matcher.get_error().split())
            raise UsageError(f"structured_outputs.{form.kind} cannot be used: {_shortened(fault)}")
        return matcher

    def _tokens(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        if self._vocabulary is None:
            words = _Vocabulary(self._tokenizer, self._vocab_size, self._stop_token_ids)
            self._vocabulary = LLTokenizer(
                TokenizerWrapper(words), n_vocab=self._vocab_size, eos_token=self._stop_token_ids
            )
        return self._vocabulary


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        if not stop_token_ids:
            raise UsageError("structured outputs need a token that ends a text, and the checkpoint names none")
        self.eos_token_id = stop_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(vocab_size)]
        self.special_token_ids = [id_ for id_ in range(vocab_size) if tokenizer.is_special(id_)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        written = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(written, add_special_tokens=False)


def _grammar(form: StructuredOutputs) -> str:
    """The form in llguidance's terms."""
    from llguidance import LLMatcher

    if form.grammar is not None:
        return LLMatcher.grammar_from_lark(form.grammar)
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in form.choice))
    schema = '{"type": "object"}' if form.json is None else form.json
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE_SPACE})


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
