"""Why targets are missed: sentences by hand, each of which belongs to a case that misses its target on a processor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.targets import Verdict
from npu_zoo.core.errors import UsageError

UNEXPLAINED = "not explained yet"


Notes = dict[str, dict[str, str]]
"""Sentences by processor, then by :attr:`~harness.targets.Verdict.key`."""


def read_notes(path: Path) -> Notes:
    """The notes of a file.

    Raises:
        UsageError: the file is no such mapping.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(found, dict) for found in data.values()):
        raise UsageError(f"{path} is to be an object of processors, each with sentences by case")
    if not all(isinstance(text, str) and text for found in data.values() for text in found.values()):
        raise UsageError(f"{path}: a processor is to have sentences by case, such as 1.3b/decode-1/vllm")
    return data


def require_matching(notes: Notes, verdicts: Mapping[str, Sequence[Verdict]]) -> None:
    """Refuse a note that no missed target has.

    Args:
        verdicts: those of each processor.

    Raises:
        UsageError: there is one; names those that have none.
    """
    missed = {(processor, one.key) for processor, found in verdicts.items() for one in found if not one.held}
    given = [(processor, key) for processor, found in notes.items() for key in found]
    stray = [key for key in given if key not in missed]
    if stray:
        raise UsageError(f"notes on cases that miss no target: {_told(stray)}; those that do: {_told(sorted(missed))}")


def _told(keys: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{key} on {processor}" for processor, key in keys) or "none"
