"""Why targets are missed: a few sentences by hand, each of which belongs to a case that misses its target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.targets import Verdict
from npu_zoo.core.errors import UsageError

UNEXPLAINED = "not explained yet"


def read_notes(path: Path) -> dict[str, str]:
    """Sentences by :attr:`~harness.targets.Verdict.key`.

    Raises:
        UsageError: the file is no such mapping.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(text, str) and text for text in data.values()):
        raise UsageError(f"{path} is to be an object of sentences by case, such as 1.3b/decode-1/vllm")
    return data


def require_matching(notes: dict[str, str], verdicts: Sequence[Verdict]) -> None:
    """Refuse a note that no missed target has.

    Raises:
        UsageError: there is one; names those that have none.
    """
    missed = {verdict.key for verdict in verdicts if not verdict.held}
    stray = [key for key in notes if key not in missed]
    if stray:
        told = ", ".join(sorted(missed)) or "none"
        raise UsageError(f"notes on cases that miss no target: {', '.join(stray)}; those that do: {told}")
