"""``plugin check``: a directory's plugins are validated as if they were installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.cli.plugin_project import Architecture, NewPlugin, write_project
from npu_zoo.registry import get_registry

pytestmark = pytest.mark.usefixtures("fresh_registry")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_project(NewPlugin("orchid"), Architecture.llama, tmp_path / "orchid")
    return tmp_path / "orchid"


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the validation was asked for, with the family that it found; it fails of the claims of level ``run``."""
    found: list[dict[str, Any]] = []

    def run_validation(plugins: tuple[str, ...], level: str, **outputs: Path | None) -> int:
        record = get_registry().plugins["orchid"]
        asked = {"plugins": plugins, "level": level, **{name: file for name, file in outputs.items() if file}}
        found.append({**asked, "distribution": record.distribution, "error": record.error})
        return int(level == "run")

    monkeypatch.setattr("npu_zoo.cli.plugin.run_validation", run_validation)
    return found


def test_the_directory_s_plugins_are_validated(
    cli: Callable, directory: Path, validations: list[dict[str, Any]]
) -> None:
    ran = cli("plugin", "check", str(directory), "--level", "build", "--junit", "claims.xml")
    assert (ran.code, ran.err) == (0, "")
    assert validations == [
        {
            "plugins": ("orchid",),
            "level": "build",
            "junit": Path("claims.xml"),
            "distribution": "npu-zoo-orchid 0.1.0",
            "error": None,
        }
    ]
    assert "orchid" not in get_registry().plugins


def test_a_claim_that_does_not_hold_gives_the_validation_s_exit_code(
    cli: Callable, directory: Path, validations: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    assert cli("plugin", "check", ".").code == 1
    assert [asked["level"] for asked in validations] == ["run"]


def test_an_installed_version_is_named_and_passed_over(
    cli: Callable,
    directory: Path,
    tmp_path: Path,
    validations: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = tmp_path / "site" / "npu_zoo_orchid-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: npu-zoo-orchid\nVersion: 0.0.1\n")
    (info / "entry_points.txt").write_text("[npu_zoo]\norchid = npu_zoo_orchid\n")
    (tmp_path / "site" / "npu_zoo_orchid.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    ran = cli("plugin", "check", str(directory), "--level", "spec")
    assert ran.err == f"note: npu-zoo-orchid 0.0.1 is installed; what is checked is {directory}\n"
    assert [asked["distribution"] for asked in validations] == ["npu-zoo-orchid 0.1.0"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda directory: directory.rename(directory.with_name("elsewhere")), 2, "is no directory; name the one"),
        (lambda directory: (directory / "pyproject.toml").unlink(), 6, "has no pyproject.toml"),
        (lambda directory: (directory / "pyproject.toml").write_text("[project"), 6, "cannot be parsed"),
        (lambda directory: (directory / "src").rename(directory / "lib"), 6, "the plugin orchid is the module"),
    ],
)
def test_what_is_no_plugin_is_said(
    cli: Callable,
    directory: Path,
    validations: list[dict[str, Any]],
    change: Callable[[Path], object],
    code: int,
    message: str,
) -> None:
    change(directory)
    ran = cli("plugin", "check", str(directory))
    assert (ran.code, validations) == (code, [])
    assert message in ran.err
