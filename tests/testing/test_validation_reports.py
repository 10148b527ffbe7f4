"""JSON, JUnit's XML and Markdown out of outcomes, and files that a report may replace."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from npu_zoo.core.errors import UsageError
from npu_zoo.testing.validation.claims import LEVELS, Level, Outcome, Status, Subject
from npu_zoo.testing.validation.report import printable, require_replaceable, to_json, to_junit, to_markdown


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ClaimReport(_Strict):
    level: Level
    plugin: str
    family: str
    row: int
    axis: str
    name: str
    claim: str
    status: Status
    message: str
    figures: dict[str, float | int | str]
    seconds: float


class Report(_Strict):
    title: str
    format: int
    npu_zoo: str
    level: Level
    complete: bool
    code: str
    counts: dict[Status, int]
    claims: list[ClaimReport]


NASTY = "a\nb | <b>`c`</b> \x1b[31m \x00 \udc80 ｜ \N{SNOWMAN} ]]>"
OUTCOMES = [
    Outcome("spec", Subject("orchid", axis="plugin"), "loads", "holds", seconds=0.5),
    Outcome("spec", Subject("orchid", "orchid", 2, "dtype", "1b on cpu"), "has dtypes", "fails", NASTY),
    Outcome("run", Subject("orchid", "orchid", 1, "", NASTY), "runs", "fails", "no", {"error": 0.5, "of": "x"}),
    Outcome("run", Subject("pipe|<i>\x07", "orchid"), "simulates", "skipped", NASTY),
]


def test_json_has_a_schema() -> None:
    report = Report.model_validate_json(to_json(OUTCOMES, "run", complete=False))
    assert (report.title, report.format, report.level, report.complete) == ("npu-zoo validate", 1, "run", False)
    assert report.counts == {"holds": 1, "fails": 2, "skipped": 1}
    assert [claim.status for claim in report.claims] == ["holds", "fails", "fails", "skipped"]
    assert json.loads(to_json(OUTCOMES, "run", complete=True))["claims"][1]["message"] == NASTY.replace(
        "\udc80", "\ufffd"
    )


def test_junit_has_a_suite_for_each_plugin_and_level() -> None:
    text = to_junit(OUTCOMES)
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert (root.tag, root.attrib["tests"], root.attrib["failures"], root.attrib["skipped"]) == (
        "testsuites", "4", "2", "1",
    )  # fmt: skip
    suites = list(root)
    assert {suite.tag for suite in suites} == {"testsuite"}
    assert [suite.attrib["name"] for suite in suites] == ["orchid spec", "orchid run", "pipe|<i>\ufffd run"]
    for suite in suites:
        cases = list(suite)
        assert {case.tag for case in cases} == {"testcase"}
        assert all({"classname", "name", "time"} <= case.attrib.keys() for case in cases)
        assert int(suite.attrib["tests"]) == len(cases)
        for tag, count in (("failure", "failures"), ("skipped", "skipped")):
            assert int(suite.attrib[count]) == len(suite.findall(f"testcase/{tag}"))
    failure = suites[0].find("testcase/failure")
    assert failure is not None
    assert failure.attrib["message"] == "a"
    assert (failure.text or "").startswith("axis dtype: a\nb")


def test_markdown_keeps_its_table_whatever_is_said() -> None:
    lines = to_markdown(OUTCOMES).splitlines()
    assert lines[0] == "<!-- npu-zoo validate -->"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert sum(line.startswith("- ") for line in lines) == 3
    assert not any(c < " " or "\ud800" <= c < "\ue000" for line in lines for c in line)
    assert not any("<b>" in line.replace("\\<", "") for line in lines)


def test_terminals_are_not_steered() -> None:
    assert printable("a\n\tb｜\N{SNOWMAN}") == "a\n\tb｜\N{SNOWMAN}"
    assert printable("\x1b[31m\x00\udc80\u202e") == r"\x1b[31m\x00\udc80\u202e"


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    earlier = [tmp_path / name for name in ("a.json", "a.xml", "a.md")]
    for file, text in zip(earlier, (to_json([], "spec", complete=True), to_junit([]), to_markdown([])), strict=True):
        file.write_text(text)
    require_replaceable([*earlier, tmp_path / "new.json"])
    other = tmp_path / "notes.md"
    other.write_text("# Mine\n")
    (tmp_path / "pipe").symlink_to("/dev/null")
    cases: list[tuple[list[Any], str]] = [
        ([other], "exists and is no report of `npu-zoo validate`"),
        ([tmp_path], "is a folder"),
        ([tmp_path / "nowhere" / "a.json"], "is no folder; make it first"),
        ([tmp_path / "pipe"], "is no plain file"),
        ([tmp_path / "b", tmp_path / "b"], "is named for two reports"),
    ]
    for files, message in cases:
        with pytest.raises(UsageError, match=message):
            require_replaceable(files)
    assert other.read_text() == "# Mine\n"


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written to; name a file elsewhere"):
        require_replaceable([tmp_path / "a.json"])


def test_levels_come_in_order() -> None:
    assert LEVELS == ("spec", "build", "run", "simulate")
