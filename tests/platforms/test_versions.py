from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from npu_zoo.platforms.versions import (
    DRIVERS,
    PYTHON,
    RELEASES,
    SUPPORTED,
    Range,
    least_driver,
    minor,
    newest_cann,
    numbers,
    pythons_of,
    releases_of,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = ("install-ascend.md", "install-ascend.zh-CN.md")


def test_every_row_has_its_source() -> None:
    assert [row for row in (*RELEASES, *DRIVERS) if len(row.source) < 10] == []


def test_a_pair_is_of_one_release_and_newest_first() -> None:
    assert [row for row in RELEASES if numbers(row.torch_npu) != numbers(row.torch)] == []
    assert [numbers(r.torch) for r in RELEASES] == sorted((numbers(r.torch) for r in RELEASES), reverse=True)
    assert len({row.torch_npu for row in RELEASES}) == len(RELEASES)


def test_versions_have_the_form_of_versions() -> None:
    for row in RELEASES:
        assert re.fullmatch(r"\d+\.\d+\.\d+(\.post\d+)?", row.torch_npu)
        assert re.fullmatch(r"(\d+\.\d+\.\d+)?", row.cann)
        assert all(re.fullmatch(r"3\.\d+", python) for python in row.pythons)
    for driver in DRIVERS:
        assert re.fullmatch(r"\d+\.\d+", driver.cann)
        assert re.fullmatch(r"\d+\.\d+", driver.driver)


def test_every_cann_of_a_release_has_a_least_driver() -> None:
    assert {minor(row.cann) for row in RELEASES if row.cann} == {row.cann for row in DRIVERS}


def test_the_ranges_are_those_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [entry for group in ("run", "npu") for entry in project["optional-dependencies"][group]]
    asked = dict(match.groups() for entry in wanted if (match := re.match(r"([\w-]+)(>=[\d.]+,<[\d.]+)$", entry)))
    assert {name: asked[name.replace("_", "-")] for name in SUPPORTED} == {n: str(r) for n, r in SUPPORTED.items()}
    assert project["requires-python"] == f">={PYTHON}"


def test_the_table_covers_the_range_of_torch_npu() -> None:
    covered = {minor(row.torch_npu) for row in RELEASES}
    first, below = (numbers(end)[1] for end in (SUPPORTED["torch_npu"].least, SUPPORTED["torch_npu"].below))
    assert covered == {f"2.{number}" for number in range(first, below)}


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.9.0.post6", (2, 9, 0)), ("8.3.RC1", (8, 3)), ("24.1.rc2", (24, 1)), ("dev", ())],
)
def test_numbers_of_versions(version: str, expected: tuple[int, ...]) -> None:
    assert numbers(version) == expected


def test_a_range_holds_its_least_and_not_its_end() -> None:
    versions = Range("2.9", "2.15")
    assert [v for v in ("2.8.1", "2.9", "2.9.0", "2.10.0+cpu", "2.14.9", "2.15.0", "3") if versions.holds(v)] == [
        "2.9",
        "2.9.0",
        "2.10.0+cpu",
        "2.14.9",
    ]


def test_rows_of_a_version() -> None:
    assert [row.cann for row in releases_of("2.9.0.post2+git4c901a4")] == ["9.0.0"]
    assert [row.cann for row in releases_of("2.10.0.post3")] == ["9.1.0", "9.0.0", "9.0.0"]
    assert releases_of("1.0") == []
    assert pythons_of("2.12.0") == ("3.10", "3.11", "3.12", "3.13", "3.14")
    assert pythons_of("") == ()
    assert newest_cann() == "9.1.0"
    assert (least_driver("9.1.1"), least_driver("8.5.0"), least_driver("7.0")) == ("25.2", "25.0", "")


def table(page: str, first_cell: str) -> list[tuple[str, ...]]:
    """The rows of the page's table whose head begins with a cell."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {first_cell} |") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_have_the_table(page: str) -> None:
    shown = [
        (*row[:2], *(" ".join(re.findall(r"[\d.]+", cell)) for cell in row[2:])) for row in table(page, "torch_npu")
    ]
    ends = [" ".join((row.pythons[0], row.pythons[-1])) if row.pythons else "" for row in RELEASES]
    assert shown == [(r.torch_npu, r.torch, r.cann, end) for r, end in zip(RELEASES, ends, strict=True)]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_have_the_drivers(page: str) -> None:
    shown = [(row[0], re.findall(r"[\d.]+", row[1])[0]) for row in table(page, "CANN")]
    assert shown == [(row.cann, row.driver) for row in DRIVERS]


def test_both_pages_have_the_same_commands() -> None:
    english, chinese = ((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)

    def commands(text: str) -> list[str]:
        lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
        return [line for line in lines if line]

    assert commands(english)
    assert commands(english) == commands(chinese)


def test_the_readmes_link_the_pages() -> None:
    for readme, page in (("README.md", PAGES[0]), ("README.zh-CN.md", PAGES[1])):
        assert f"(docs/{page})" in (ROOT / readme).read_text(encoding="utf-8")
