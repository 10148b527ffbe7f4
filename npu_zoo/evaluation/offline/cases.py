"""Which batches are run: pairs of lengths and batch sizes, as MindIE's users write them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from npu_zoo.core.errors import UsageError

CASES_EXAMPLE = "[[2048,2048],[1024,1024]]"
BATCH_EXAMPLE = "1,4 for all pairs, or [[1,4],[1,8]] with a list for each"
WARM_UP_TOKENS = 4
"""Output tokens of the run before a case's rounds: enough for every kind of step."""


class Case(NamedTuple):
    """So many prompts of ``input`` tokens at once, each with ``output`` tokens generated."""

    input: int
    output: int
    batch: int

    @property
    def length(self) -> int:
        """Tokens of one sequence at its end."""
        return self.input + self.output

    @property
    def name(self) -> str:
        """Such as ``[2048,2048] x 4``."""
        return f"[{self.input},{self.output}] x {self.batch}"


class CaseList(NamedTuple):
    """What is to be run, in order, and remarks on how that differs from what was written."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...]


def read_cases(pairs: str, batches: str) -> CaseList:
    """Cases by batch size, those of a batch size from large to small, none of them twice.

    Args:
        pairs: ``[[input, output], …]``, or one such pair.
        batches: ``1``, ``1,4``, ``[1,4]``, or a list for each pair: ``[[1,4],[1,8]]``.

    Raises:
        UsageError: a text is something else; names the entry.
    """
    listed = _read_pairs(pairs)
    given = [
        Case(*pair, batch)
        for pair, own in zip(listed, _read_batches(batches, len(listed)), strict=True)
        for batch in own
    ]
    unique = list(dict.fromkeys(given))
    sizes = list(dict.fromkeys(case.batch for case in given))
    cases = tuple(sorted(unique, key=lambda case: (sizes.index(case.batch), -case.length, -case.input)))
    return CaseList(cases, tuple(_notes(listed, given, unique)))


def _notes(pairs: Sequence[tuple[int, int]], given: Sequence[Case], unique: Sequence[Case]) -> Iterable[str]:
    if len(unique) < len(given):
        doubled = dict.fromkeys(case.name for case in given if given.count(case) > 1)
        yield f"given more than once, and run once: {', '.join(doubled)}"
    if list(pairs) != sorted(pairs, key=lambda pair: (-sum(pair), -pair[0])):
        yield "pairs are run from large to small, whatever order they are given in"


def _read_pairs(text: str) -> list[tuple[int, int]]:
    value = _read_list(text, "--cases", CASES_EXAMPLE)
    entries = value if any(isinstance(entry, list) for entry in value) else [value]
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise _fault("--cases", entry, "is no pair [input, output]", CASES_EXAMPLE)
        _require_counts(entry, entry, "--cases", CASES_EXAMPLE)
    return [(first, second) for first, second in entries]


def _read_batches(text: str, count: int) -> list[list[int]]:
    value = _read_list(text, "--batch", BATCH_EXAMPLE)
    if not any(isinstance(entry, list) for entry in value):
        _require_counts(value, value, "--batch", BATCH_EXAMPLE)
        return [value] * count
    if len(value) != count:
        raise UsageError(
            f"--batch {text}: {len(value)} list(s) of batch sizes for {count} pair(s) of --cases; give {BATCH_EXAMPLE}"
        )
    for entry in value:
        if not isinstance(entry, list) or not entry:
            raise _fault("--batch", entry, "is no list of batch sizes", BATCH_EXAMPLE)
        _require_counts(entry, entry, "--batch", BATCH_EXAMPLE)
    return value


def _require_counts(values: Sequence[Any], entry: Any, option: str, example: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _fault(option, entry, f"holds {json.dumps(value)}, which is no whole number", example)
        if value < 1:
            raise _fault(option, entry, f"holds {value}, and at least 1 is due", example)


def _read_list(text: str, option: str, example: str) -> list[Any]:
    stripped = text.strip()
    try:
        value = json.loads(stripped if stripped.startswith("[") else f"[{stripped}]")
    except (ValueError, RecursionError):
        raise UsageError(f"{option} {text!r} is no list of numbers; write {example}") from None
    if not value:
        raise UsageError(f"{option} {text!r} is empty; write {example}")
    return list(value)


def _fault(option: str, entry: Any, what: str, example: str) -> UsageError:
    return UsageError(f"{option}: the entry {json.dumps(entry)} {what}; write {example}")
