"""What came of a validation, for programs and CI services: JSON, JUnit's XML, Markdown."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import npu_zoo
from npu_zoo.core.errors import UsageError
from npu_zoo.testing.validation.claims import LEVELS, Level, Outcome

TITLE = "npu-zoo validate"
FORMAT = 1
"""Of the JSON; a change that readers would notice makes it another."""

# What no UTF-8 can hold, and what a message may quote of a damaged file name.
_SURROGATE = re.compile("[\ud800-\udfff]")

# Characters that XML 1.0 cannot hold, which a message may quote.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many claims hold, fail and were skipped."""
    found = Counter(outcome.status for outcome in outcomes)
    return {status: found[status] for status in ("holds", "fails", "skipped")}


def to_json(outcomes: Sequence[Outcome], level: Level, *, complete: bool, code: str = "") -> str:
    """Everything, as one object: ``claims`` has an object for each claim.

    Args:
        code: what the outcomes rest on; a later run takes them over where it is the same.
    """
    found: dict[str, Any] = {
        "title": TITLE,
        "format": FORMAT,
        "npu_zoo": npu_zoo.__version__,
        "level": level,
        "complete": complete,
        "code": code,
        "counts": counts(outcomes),
        "claims": [_claim(outcome) for outcome in outcomes],
    }
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return _SURROGATE.sub("\ufffd", text)


def _claim(outcome: Outcome) -> dict[str, Any]:
    subject = asdict(outcome.subject)
    named = {"plugin": subject.pop("plugin"), **subject}
    return {
        "level": outcome.level,
        **named,
        "claim": outcome.text,
        "status": outcome.status,
        "message": outcome.message,
        "figures": dict(outcome.figures),
        "seconds": round(outcome.seconds, 3),
    }


def to_junit(outcomes: Sequence[Outcome]) -> str:
    """A test suite for each plugin and level, a test case for each claim."""
    root = ElementTree.Element("testsuites", {"name": TITLE, **_totals(outcomes)})
    for plugin in dict.fromkeys(outcome.subject.plugin for outcome in outcomes):
        for level in LEVELS:
            found = [outcome for outcome in outcomes if (outcome.subject.plugin, outcome.level) == (plugin, level)]
            if found:
                suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(f"{plugin} {level}"), **_totals(found)})
                for outcome in found:
                    _add_case(suite, outcome)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _totals(outcomes: Sequence[Outcome]) -> dict[str, str]:
    found, seconds = counts(outcomes), sum(outcome.seconds for outcome in outcomes)
    totals = {"tests": len(outcomes), "failures": found["fails"], "skipped": found["skipped"], "errors": 0}
    return {**{name: str(value) for name, value in totals.items()}, "time": f"{seconds:.3f}"}


def _add_case(suite: ElementTree.Element, outcome: Outcome) -> None:
    name = _xml(f"{outcome.subject.describe()}: {outcome.text}")
    classname = _xml(f"{outcome.subject.plugin}.{outcome.level}")
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name, time=f"{outcome.seconds:.3f}")
    if outcome.status == "fails":
        told = ElementTree.SubElement(case, "failure", message=_xml(outcome.message.split("\n")[0]))
        told.text = _xml(f"axis {outcome.subject.axis}: {outcome.message}" if outcome.subject.axis else outcome.message)
    elif outcome.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=_xml(outcome.message))


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of counts, what fails, and what could not be told; as a job's summary shows it."""
    lines = [
        f"<!-- {TITLE} -->",
        "# Validation",
        "",
        "| plugin | family | level | holds | fails | skipped |",
        "|---" * 6 + "|",
    ]
    for (plugin, family, level), found in summary(outcomes).items():
        cells = (plugin, family or "-", level, *(str(found[status]) for status in ("holds", "fails", "skipped")))
        lines.append(f"| {' | '.join(map(_markdown, cells))} |")
    for title, status in (("Fails", "fails"), ("Could not be told here", "skipped")):
        told = [outcome for outcome in outcomes if outcome.status == status]
        if told:
            lines += ["", f"## {title}", ""]
            lines += [f"- {_markdown(f'{describe(outcome)}: {outcome.message}')}" for outcome in told]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """One line that Markdown shows as it is, in tables too."""
    return re.sub(r"([\\`*|<])", r"\\\1", printable(" ".join(text.split())))


def printable(text: str) -> str:
    """A text without what would steer a terminal, and without what no file can hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def summary(outcomes: Iterable[Outcome]) -> dict[tuple[str, str, Level], dict[str, int]]:
    """Counts by plugin, family and level."""
    found: dict[tuple[str, str, Level], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.subject.plugin, outcome.subject.family, outcome.level), []).append(outcome)
    return {key: counts(group) for key, group in found.items()}


def describe(outcome: Outcome) -> str:
    """Whose claim it is, on which axis, and what it says."""
    subject = outcome.subject
    axis = f" [{subject.axis}]" if subject.axis else ""
    whose = "" if subject.plugin == (subject.family or subject.plugin) else f"plugin {subject.plugin}: "
    return f"{whose}{subject.describe()}{axis}: {outcome.text}"


def require_replaceable(files: Sequence[Path]) -> None:
    """Refuse to write over what is no earlier report, before anything is run.

    Raises:
        UsageError: a file exists and is something else, its folder cannot be written to, or it is named twice.
    """
    for number, file in enumerate(files):
        if file.absolute() in [other.absolute() for other in files[:number]]:
            raise UsageError(f"{file} is named for two reports; name a file for each")
        if file.is_dir() or not file.parent.is_dir():
            raise UsageError(f"{file} is a folder" if file.is_dir() else f"{file.parent} is no folder; make it first")
        if not os.access(file.parent, os.W_OK):
            raise UsageError(f"{file.parent} cannot be written to; name a file elsewhere")
        if file.exists() and not file.is_file():
            raise UsageError(f"{file} is no plain file; name another")
        if file.exists() and TITLE not in file.read_text("utf-8", errors="replace")[:400]:
            raise UsageError(f"{file} exists and is no report of `{TITLE}`; name another file, or remove it")
