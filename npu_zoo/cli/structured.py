"""``--json-schema``, ``--regex``, ``--choice`` and ``--grammar``: what an output has to look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from npu_zoo.cli.prompts import read_text
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs

OPTIONS = "--json-schema, --regex, --choice and --grammar"


def structured_outputs(
    json_schema: Path | None, regex: str | None, choice: Sequence[str] | None, grammar: Path | None
) -> StructuredOutputs | None:
    """What the options ask for; None where they ask for nothing.

    Raises:
        UsageError: several are given, or a file cannot be read or is empty or no JSON.
    """
    given = [value for value in (json_schema, regex, choice, grammar) if value]
    if len(given) > 1:
        raise UsageError(f"{OPTIONS} exclude each other; give one")
    if json_schema:
        return StructuredOutputs(json=_schema(json_schema))
    if grammar:
        return StructuredOutputs(grammar=_content(grammar))
    return StructuredOutputs(regex=regex, choice=tuple(choice or ())) if given else None


def _schema(path: Path) -> str:
    text = _content(path)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} holds no JSON schema: {error}") from error
    return text


def _content(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{path} is empty")
    return text
