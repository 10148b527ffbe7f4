"""What an interrupted validation has found out already, of the code at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import npu_zoo
from npu_zoo.core.errors import UsageError
from npu_zoo.testing.evidence import digest_of_files, plugin_files
from npu_zoo.testing.simulation import installed_version
from npu_zoo.testing.validation.claims import Claim, Outcome
from npu_zoo.testing.validation.scope import Part

_MATTERING = ("torch", "torch_npu", "transformers", "numpy")


def code_of(parts: Iterable[Part]) -> str:
    """What an outcome rests on: this package's code, the plugins', and the versions of what computes."""
    files = set(Path(npu_zoo.__file__).parent.rglob("*.py"))
    for part in parts:
        files |= {file for family in part.families for file in plugin_files(family, part.record)}
    return " ".join([digest_of_files(files), *(f"{name}-{installed_version(name) or 'none'}" for name in _MATTERING)])


def outcomes_of(file: Path, claims: Sequence[Claim], code: str) -> dict[int, Outcome]:
    """Of claims that run code, by their place, those that held in an earlier report; none where other code ran then.

    Args:
        file: what ``--json`` wrote.
        code: :func:`code_of` today.

    Raises:
        UsageError: the file cannot be read, or is no such report.
    """
    report = _read(file)
    if report.get("code") != code:
        return {}
    try:
        known = [_key(claim) for claim in report["claims"]]
        held = {_key(claim): claim for claim in report["claims"] if claim["status"] == "holds"}
    except (KeyError, TypeError) as error:
        raise UsageError(f"{file} is no report of `npu-zoo validate --json`: {error!r}") from None
    found = {}
    for number, claim in enumerate(claims):
        subject = claim.subject
        key = (claim.level, subject.plugin, subject.family, subject.row, subject.axis, subject.name, claim.text)
        if claim.apart and key in held and known.count(key) == 1:
            earlier = held[key]
            figures, seconds = earlier["figures"], earlier["seconds"]
            found[number] = Outcome(claim.level, subject, claim.text, "holds", "", figures, seconds)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as a report of `npu-zoo validate --json`: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("claims"), list):
        raise UsageError(f"{file} is no report of `npu-zoo validate --json`")
    return report


def _key(claim: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(claim[name] for name in ("level", "plugin", "family", "row", "axis", "name", "claim"))
