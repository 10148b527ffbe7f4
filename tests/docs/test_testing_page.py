"""docs/testing.md names what there is, its examples run, and its jobs for CI services ask for what exists."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import npu_zoo.testing
from npu_zoo.api import FamilySpec, KernelSpec, hookimpl
from npu_zoo.cli import main
from npu_zoo.core.truth import Line, SourceTable, TruthTable
from npu_zoo.registry import Candidate, build_registry, get_registry, registry_in_place
from npu_zoo.testing import simulation
from npu_zoo.testing.kernels import TOLERANCE
from npu_zoo.testing.validation import processes, report
from npu_zoo.testing.validation.cells import MEAN_BOUND
from npu_zoo.testing.validation.claims import LEVELS, Claim, Outcome, Subject
from npu_zoo.testing.validation.scope import Part, parts_of, validation_registry
from npu_zoo.testing.validation.suite import claims_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
CI = ROOT / "docs" / "ci"
TEMPLATES = ROOT / "npu_zoo" / "cli" / "plugin_template" / "common"
PLUGIN = "my_llama"

Accept = Callable[[list[str]], None]


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    return re.split(rf"^#+ {re.escape(title)}\n", PAGE, flags=re.MULTILINE)[1].split("\n#")[0]


def rows(table: str) -> list[list[str]]:
    """The cells of a table's lines below its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def indented(text: str) -> Iterator[list[str]]:
    """The words of each indented command."""
    for line in re.findall(r"^    ((?:npu-zoo|pytest) .*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M):
        yield shlex.split(line, comments=True)


# The functions


@pytest.mark.parametrize("name", npu_zoo.testing.__all__)
def test_every_name_is_explained(name: str) -> None:
    assert re.search(rf"\*\*`{name}[`(]", section("In tests"))


def test_no_other_name_is_explained() -> None:
    assert set(re.findall(r"\*\*`(\w+)", section("In tests"))) == set(npu_zoo.testing.__all__)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    imported = {
        name
        for block in blocks
        for line in re.findall(r"from npu_zoo.testing import (.*)", block)
        for name in line.split(", ")
    }
    assert imported == set(npu_zoo.testing.__all__)
    module, *tests = blocks
    assert f"`my_plugin.py`:\n\n```python\n{module}" in PAGE
    (tmp_path / "my_plugin.py").write_text(module, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec("\n".join(tests), {})


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# pytest


@pytest.mark.long
def test_the_suite_s_options_and_ids_are_as_shown(pytester_run: Callable[..., str]) -> None:
    printed = pytester_run("--npu-zoo-plugin", "wizardcoder", "--npu-zoo-level", "spec", "--collect-only", "-q")
    (shown,) = re.findall(r"`(npu-zoo:my_family::[^`]+)`", PAGE)
    assert shown.replace("my_family", "wizardcoder") in printed.splitlines()
    options = {word for words in indented(PAGE) if words[0] == "pytest" for word in words if word.startswith("--")}
    assert options == {"--npu-zoo-plugin", "--npu-zoo-level"}
    assert set(options) <= set(re.findall(r"--npu-zoo-\w+", pytester_run("--help")))


@pytest.fixture
def pytester_run(tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
        return done.stdout

    return run


# validate


def test_commands_are_accepted(accept: Accept) -> None:
    found = [words[1:] for words in indented(PAGE) if words[0] == "npu-zoo"]
    assert len(found) > 5
    for words in found:
        accept(words)


class Slips:
    """A plugin whose specs have faults that registering tells."""

    @hookimpl
    def register_families(self) -> list[FamilySpec]:
        family = get_registry().families["wizardcoder"]
        return [family.model_copy(update={"name": "slip", "rows": (family.rows[0], family.rows[0])})]

    @hookimpl
    def register_kernels(self) -> list[KernelSpec]:
        return [get_registry().kernels["cpu_linear"]] * 2


def all_claims() -> list[Claim]:
    """What the built-in plugins claim, and one with faults."""
    registry = validation_registry()
    slips = build_registry([Candidate("slips", Slips)], tolerant=True)
    found: list[Claim] = []
    for one in (registry, slips):
        with registry_in_place(one):
            parts: list[Part] = parts_of(one)
            found += claims_of(parts, "simulate")
    return found


def test_every_claim_is_listed_and_every_listed_one_is_made() -> None:
    listed = [(level, text) for level, text, _ in rows(section("Levels and claims").split("What may differ")[0])]
    assert list(dict.fromkeys(level for level, _ in listed)) == list(LEVELS)
    patterns = {(level, text): re.compile(re.escape(text).replace("…", ".+")) for level, text in listed}
    used = set()
    for claim in all_claims():
        matching = [
            entry for entry, pattern in patterns.items() if entry[0] == claim.level and pattern.fullmatch(claim.text)
        ]
        assert matching, f"{claim.level}: {claim.text}"
        used.update(matching)
    assert set(patterns) - used == set()


def test_the_bounds_are_those_that_hold() -> None:
    table = rows(section("Levels and claims").split("What may differ")[1])
    due = (TOLERANCE, MEAN_BOUND, simulation.BOUNDS)
    assert [[float(cell) for cell in cells] for _, *cells in table] == [
        [bounds[dtype] for dtype in ("float32", "float16", "bfloat16")] for bounds in due
    ]


def test_the_limits_are_those_of_the_code() -> None:
    text = section("Processes, time and memory")
    assert f"(`{processes.Limits.timeout:g}`)".replace("`", "") in text
    assert f"{processes._MEMORY_OF_A_JOB / 2**30:g} GiB" in text


def test_the_keys_of_a_report_are_those_of_the_json() -> None:
    outcome = Outcome("spec", Subject("plugin"), "loads", "holds")
    made = json.loads(report.to_json([outcome], "spec", complete=True))
    whole, claim = section("Reports").split("and a claim is an object:")
    assert [key.strip("`") for key, _ in rows(whole)] == list(made)
    assert [key.strip("`") for key, _ in rows(claim)] == list(made["claims"][0])
    assert set(dataclasses.asdict(outcome.subject)) <= set(made["claims"][0])
    assert f"| `format` | {made['format']};" in whole


def test_every_key_of_a_truth_table_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", section("Truth tables")))
    assert {name for model in (TruthTable, SourceTable, Line) for name in model.model_fields} <= named


def test_no_built_in_family_has_measured_records() -> None:
    assert "there are none yet" in section("Evidence")
    records = [record for family in get_registry().families.values() for record in family.records]
    assert {record.level for record in records} == {"simulated"}


# CI


def steps(file: Path) -> dict[str, list[str]]:
    """The commands of each job."""
    jobs: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "jobs" in jobs:
        return {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs["jobs"].items()}
    return {name: job["script"] for name, job in jobs.items()}


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_jobs_ask_for_what_exists(name: str, accept: Accept) -> None:
    found = steps(CI / name)
    assert list(found) == ["plugin", "matrix"]
    commands = [shlex.split(line) for job in found.values() for line in job]
    of_the_zoo = [words[1:] for words in commands if words[0] == "npu-zoo"]
    assert {words[0] for words in of_the_zoo} == {"validate", "check"}
    for words in of_the_zoo:
        accept(words)
    options = {word for words in commands if words[0] == "pytest" for word in words if word.startswith("--")}
    assert options == {"--npu-zoo-plugin", "--npu-zoo-level"}


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_combinations_that_a_job_relies_on_are_offered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [line for line in steps(CI / name)["matrix"] if line.startswith("npu-zoo check")]
    assert checks
    for line in checks:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "template"),
    [("github-actions.yml", "dot-github/workflows/ci.yml.tmpl"), ("gitlab-ci.yml", "dot-gitlab-ci.yml.tmpl")],
)
def test_a_new_plugin_s_job_is_part_of_the_one_that_is_shown(name: str, template: str, tmp_path: Path) -> None:
    text = string.Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(name=PLUGIN)
    written = tmp_path / "ci.yml"
    written.write_text(text, encoding="utf-8")
    (made,) = steps(written).values()
    shown = steps(CI / name)["plugin"]
    assert [line for line in made if not any(other.startswith(line) for other in shown)] == []
    ours, theirs = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (CI / name, written))
    ours, theirs = (jobs.get("jobs", jobs) for jobs in (ours, theirs))
    for key in ("strategy", "parallel", "env", "variables", "image"):
        assert ours["plugin"].get(key) == theirs["test"].get(key)
