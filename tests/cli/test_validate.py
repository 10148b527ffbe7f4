"""``validate`` on the command line: what goes where, which exit code, and what is refused before anything runs."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.cli import validate
from npu_zoo.registry import registry_in_place
from npu_zoo.testing.validation import measuring, processes, resuming, suite
from npu_zoo.testing.validation.claims import CannotTell, Claim, ClaimFails, Figures, Subject
from npu_zoo.testing.validation.scope import parts_of, validation_registry


def check(message: str, error: type[Exception] | None) -> Figures:
    if error:
        raise error(message)
    return {}


def claim(row: int, message: str = "", error: type[Exception] | None = None, *, apart: bool = False) -> Claim:
    subject, judged = Subject("orchid", "orchid", row, "dtype"), functools.partial(check, message, error)
    return Claim("spec", subject, "is so", judged, apart)


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """What is claimed in place of the plugins' own claims."""
    found: list[Claim] = []
    monkeypatch.setattr(suite, "claims_of", lambda parts, level, *, only=False: list(found))
    return found


def test_only_the_table_is_on_stdout_and_progress_comes_in_lines(
    cli: Callable, claims: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims += [claim(number) for number in range(1, 4)] + [claim(4, "it is not", ClaimFails)]
    monkeypatch.setattr(validate, "_SECONDS_BETWEEN_LINES", -1.0)
    ran = cli("validate", "wizardcoder", "--level", "spec")
    lines = ran.err.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("2/4 claims, ")
    assert lines[1].endswith(" s left")
    assert lines[3].endswith("about 0 s left, 1 failed")
    assert ran.code == 6
    assert ran.out.splitlines()[:2] == ["fails:", "- orchid row 4 [dtype]: is so: it is not"]
    assert ran.out.splitlines()[-1] == "3 of 4 claims hold, 1 fail, 0 cannot be told here"


def test_quick_validations_say_nothing_of_progress(cli: Callable, claims: list[Claim]) -> None:
    claims.append(claim(1))
    ran = cli("validate", "wizardcoder", "--level", "spec")
    assert (ran.code, ran.err) == (0, "")


def test_what_many_claims_lack_is_told_once_and_failures_one_by_one(cli: Callable, claims: list[Claim]) -> None:
    claims += [claim(number, "there is no NPU", CannotTell) for number in range(1, 4)]
    claims += [claim(number, "no", ClaimFails) for number in (7, 8)]
    out = cli("validate", "wizardcoder", "--level", "spec").out
    assert "- orchid row 1 [dtype]: is so: there is no NPU (and 2 more)" in out.splitlines()
    assert [line for line in out.splitlines() if line.endswith(": no")] == [
        "- orchid row 7 [dtype]: is so: no",
        "- orchid row 8 [dtype]: is so: no",
    ]


def test_messages_do_not_steer_the_terminal(cli: Callable, claims: list[Claim]) -> None:
    claims.append(claim(1, "\x1b]0;title\x07 and\r more\n\nlines", ClaimFails))
    out = cli("validate", "wizardcoder", "--level", "spec").out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"\x1b]0;title\x07" in out


def test_reports_are_written_beside_the_table(cli: Callable, claims: list[Claim], tmp_path: Path) -> None:
    claims += [claim(1), claim(2, "no", ClaimFails)]
    options = [f"--{kind}={tmp_path / kind}" for kind in ("json", "junit", "markdown")]
    for _ in range(2):  # the second time over its own
        ran = cli("validate", "wizardcoder", "--level", "spec", *options)
        assert ran.code == 6
        assert ran.err.splitlines() == [f"note: wrote {tmp_path / kind}" for kind in ("json", "junit", "markdown")]
    found = json.loads((tmp_path / "json").read_text())
    assert (found["complete"], found["counts"]) == (True, {"holds": 1, "fails": 1, "skipped": 0})


def test_a_report_does_not_replace_another_file(cli: Callable, claims: list[Claim], tmp_path: Path) -> None:
    claims.append(claim(1, "this must not run", SystemError))
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    ran = cli("validate", "wizardcoder", "--level", "spec", "--json", str(notes))
    assert (ran.code, ran.out, notes.read_text()) == (2, "", "{}")
    assert "is no report of `npu-zoo validate`; name another file, or remove it" in ran.err


def test_a_report_that_cannot_be_written_takes_no_other_along(
    cli: Callable, claims: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims.append(claim(1))
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "a.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    a, b = tmp_path / "a.json", tmp_path / "b.xml"
    ran = cli("validate", "wizardcoder", "--level", "spec", "--json", str(a), "--junit", str(b))
    assert ran.code == 2
    assert f"cannot write {a}: No space left on device" in ran.err
    assert "1 of 1 claims hold" in ran.out
    assert list(tmp_path.iterdir()) == [b]


def test_an_interruption_reports_what_was_judged(
    cli: Callable, claims: list[Claim], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims += [claim(number) for number in range(1, 5)]
    judge = processes.judge

    def interrupted(claims: Any, limits: Any) -> Iterator[Any]:
        for number, outcome in judge(claims, limits):
            if number == 2:
                raise KeyboardInterrupt
            yield number, outcome

    monkeypatch.setattr(processes, "judge", interrupted)
    report, folder = tmp_path / "a.json", tmp_path / "evidence"
    ran = cli("validate", "wizardcoder", "--level", "simulate", "--json", str(report), "--evidence", str(folder))
    assert ran.code == 130
    assert ran.err.splitlines()[0] == "note: interrupted: 2 of 4 claims are known; --json keeps them for --resume"
    found = json.loads(report.read_text())
    assert (found["complete"], len(found["claims"])) == (False, 2)
    assert list(folder.iterdir()) == []


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows whose claims are judged, all of them in this process."""
    found: list[int] = []

    def judge(claims: list[Claim], limits: Any) -> Iterator[Any]:
        for number, one in enumerate(claims):
            found.append(one.subject.row)
            yield number, one.judge()

    monkeypatch.setattr(processes, "judge", judge)
    return found


def test_what_held_is_taken_over_from_an_interrupted_run(
    cli: Callable, claims: list[Claim], judged: list[int], tmp_path: Path
) -> None:
    report = tmp_path / "a.json"
    claims += [claim(1, apart=True), claim(2, "it is not", ClaimFails, apart=True), claim(3)]
    assert cli("validate", "wizardcoder", "--level", "spec", "--json", str(report)).code == 6
    claims.append(claim(4, apart=True))
    judged.clear()
    ran = cli("validate", "wizardcoder", "--level", "spec", "--resume", str(report), "--json", str(report))
    assert ran.err.splitlines()[0] == f"note: 1 of 4 claims are taken over from {report}"
    assert judged == [2, 3, 4]  # what data alone tells is asked again, as it takes no time
    assert [claim["row"] for claim in json.loads(report.read_text())["claims"]] == [1, 2, 3, 4]


def test_nothing_is_taken_over_from_other_code(
    cli: Callable, claims: list[Claim], judged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "a.json"
    claims.append(claim(1, apart=True))
    cli("validate", "wizardcoder", "--level", "spec", "--json", str(report))
    monkeypatch.setattr(resuming, "code_of", lambda parts: "another")
    ran = cli("validate", "wizardcoder", "--level", "spec", "--resume", str(report))
    assert "note: 0 of 1 claims are taken over" in ran.err
    assert judged == [1, 1]


@pytest.mark.parametrize("text", ["", "[]", '{"claims": 1}', None])
def test_what_is_no_report_cannot_be_resumed(
    cli: Callable, claims: list[Claim], tmp_path: Path, text: str | None
) -> None:
    claims.append(claim(1))
    report = tmp_path / "a.json"
    if text is not None:
        report.write_text(text)
    ran = cli("validate", "wizardcoder", "--level", "spec", "--resume", str(report))
    assert ran.code == 2
    assert str(report) in ran.err
    assert "report of `npu-zoo validate --json`" in ran.err


def test_a_claim_that_cannot_be_listed_is_a_failure(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(part: Any) -> Iterator[Claim]:
        yield claim(1)
        raise ValueError("rows are no rows")

    monkeypatch.setitem(suite._CLAIMS, "spec", broken)  # type: ignore[arg-type]
    ran = cli("validate", "wizardcoder", "--level", "spec")
    assert ran.code == 6
    assert "- wizardcoder [plugin]: its claims can be listed: ValueError: rows are no rows" in ran.out.splitlines()
    assert ", 1 fail, " in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin", "orchid"], "no plugin is named 'orchid'; installed: deepseek_coder"),
        (["orchid"], "no model family is named 'orchid'; families: deepseek_coder"),
        (["--level", "deep"], "'deep' is not one of"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["--measure", "--hardware", "abacus"], "unknown hardware 'abacus'; known: atlas_800i_a2"),
    ],
)
def test_what_does_not_exist_is_said(cli: Callable, arguments: list[str], message: str) -> None:
    ran = cli("validate", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_hardware_that_is_not_there_is_not_measured(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "detect_products", lambda: ("cpu",))
    ran = cli("validate", "wizardcoder", "--measure", "--hardware", "atlas_800i_a2")
    assert (ran.code, ran.out) == (4, "")
    assert "--hardware atlas_800i_a2, and this machine's devices are those of cpu" in ran.err


def test_a_machine_that_can_be_two_products_asks_which(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "detect_products", lambda: ("atlas_800i_a2", "atlas_800t_a2"))
    ran = cli("validate", "wizardcoder", "--measure")
    assert ran.code == 4
    assert "name it: --hardware atlas_800i_a2" in ran.err


def test_a_simulated_device_measures_nothing(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.simulate", lambda: None)
    monkeypatch.setenv("NPU_ZOO_SIMULATE", "atlas_800i_a2")
    ran = cli("validate", "wizardcoder", "--measure")
    assert ran.code == 2
    assert "a simulated device measures nothing; unset it, or take --level simulate" in ran.err


def test_processes_that_are_not_installed_are_asked_for(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_importable", lambda name: name != "pebble")
    ran = cli("validate", "wizardcoder", "--level", "build")
    assert ran.code == 4
    assert "pip install 'npu-zoo[testing]'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hardware", "cpu"], "--hardware is for --measure"),
        (["--evidence", "records"], "--evidence is for --measure and --level simulate"),
        (["--measure", "--only"], "leave out --only"),
        (["--measure", "--resume", "a.json"], "leave out --resume"),
    ],
)
def test_options_that_would_do_nothing_are_refused(cli: Callable, arguments: list[str], told: str) -> None:
    ran = cli("validate", "wizardcoder", *arguments)
    assert ran.code == 2
    assert told in ran.err


def test_a_level_of_which_nothing_is_claimed_or_told_does_not_pass(cli: Callable, claims: list[Claim]) -> None:
    ran = cli("validate", "wizardcoder", "--level", "simulate", "--only")
    assert ran.code == 2
    assert "nothing is claimed at level simulate by wizardcoder" in ran.err
    claims.append(claim(1, "there is no NPU", CannotTell))
    ran = cli("validate", "wizardcoder", "--level", "spec")
    assert ran.code == 4
    assert "no claim of level spec could be told here" in ran.err
    claims.append(claim(2))
    assert cli("validate", "wizardcoder", "--level", "spec").code == 0


def test_claims_of_the_built_in_plugins_have_names_of_their_own() -> None:
    registry = validation_registry()
    with registry_in_place(registry):
        names = [one.id for one in suite.claims_of(parts_of(registry), "simulate")]
    assert [name for name, count in Counter(names).items() if count > 1] == []
