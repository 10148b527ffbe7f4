"""Which tokens may come next where an output has to keep a form: masks by llguidance. Needs no torch.

A grammar is compiled once and copied for each sequence that has it. What a grammar may cost is bounded by llguidance's
own limits, at the start as in every step, and by those below.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from npu_zoo.engine.tokenizer import Tokenizer

ResultT = TypeVar("ResultT")

_SLOW_S = 0.05  # of CPU time for a mask; everything that runs waits for it
_MOST_SLOW_MASKS = 16
_KEPT = 32  # grammars that are kept compiled; the costliest take some 70 MiB
_LONGEST = 512 * 1024  # characters of a description
_FUEL = 50_000  # of llguidance's million: repetitions of what may be empty take memory that grows with its square
_FUEL_PER_CHARACTER = 0.6  # JSON schemas take less
_MEANINGS = {
    "NoExtensionBias": "no text can have this form",
    "lexer precomputation failed": "it takes too much time or memory to compile; simplify it",
}
_STARTING = threading.Lock()  # the size of stacks is the whole process's

STACK_SIZE = 512 * 2**20
"""Bytes that compiling may descend by: llguidance follows rules and references as deep as they lead, without a limit.

They are address space; memory is taken as far as they are used.
"""
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
        self._slow_masks = 0

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
        start = time.thread_time()
        bits = self._matcher.compute_bitmask()[: self._num_bytes]
        self._slow_masks += time.thread_time() - start > _SLOW_S
        return bits

    @property
    def error(self) -> str:
        """Why the output cannot go on; empty where it can."""
        if self._slow_masks > _MOST_SLOW_MASKS:
            return f"{self._slow_masks} of its tokens took more than {_SLOW_S * 1e3:g} ms each; simplify it"
        return _readable(self._matcher.get_error())


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
            matcher = self._compiled.get(form)
            if matcher is None:
                matcher = self._compiled[form] = self._compile(form)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(form)
            return Guide(matcher.deep_copy(), self._vocab_size)

    def check(self, form: StructuredOutputs) -> None:
        """Raise what :meth:`make` raises for a form, and keep nothing of it."""
        self._compile(form)

    def _compile(self, form: StructuredOutputs) -> LLMatcher:
        try:
            return _with_deep_stack(lambda: self._matcher(form))
        except ImportError:
            raise UsageError(
                "structured outputs need llguidance, which is not installed: pip install 'npu-zoo[run]'"
            ) from None
        except ValueError as error:
            raise UsageError(f"structured_outputs.{form.kind} cannot be used: {_readable(str(error))}") from error

    def _matcher(self, form: StructuredOutputs) -> LLMatcher:
        """A grammar at its beginning; raises ValueError for one that cannot be used."""
        from llguidance import LLMatcher, LLParserLimits

        size = sum(map(len, form.choice)) + len(form.json or form.regex or form.grammar or "")
        if size > _LONGEST:
            raise ValueError(f"it has {size} characters, and {_LONGEST} are the most")
        fuel = max(_FUEL, int(_FUEL_PER_CHARACTER * size))
        limits = LLParserLimits(initial_lexer_fuel=fuel, verbose_errors=False)
        matcher = LLMatcher(self._tokens(), _grammar(form), log_level=0, limits=limits)
        matcher.compute_bitmask()  # some faults show when the first token is looked for
        if matcher.is_error():
            raise ValueError(matcher.get_error())
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
        # As one terminal, of which there may be thousands of alternatives; of rules there may not.
        return LLMatcher.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, form.choice)))
    schema = '{"type": "object"}' if form.json is None else _object_schema(form.json)
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE_SPACE})


def _object_schema(schema: str) -> str:
    """The schema as an object: true and false are ones too, and llguidance takes no options beside them."""
    if schema.strip() == "false":
        raise ValueError("no text can have this form")
    return "{}" if schema.strip() == "true" else schema


def _readable(fault: str, length: int = 300) -> str:
    """What llguidance says of a grammar, in one line of bounded length."""
    text = " ".join(fault.replace("<non-verbose/>", "").split())
    for beginning, meaning in _MEANINGS.items():
        if text.startswith(beginning):
            return meaning
    return text if len(text) <= length else text[: length - 1] + "…"


def _with_deep_stack(work: Callable[[], ResultT]) -> ResultT:
    """The result of some work, which a stack of this thread's size might be too small for."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    with _STARTING:
        before = threading.stack_size(STACK_SIZE)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return future.result()
