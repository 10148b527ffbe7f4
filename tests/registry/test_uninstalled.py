"""Plugins of directories that are not installed, found as if they were."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from npu_zoo.core.errors import PluginError, UsageError
from npu_zoo.registry import PLUGINS_VARIABLE, get_registry
from npu_zoo.uninstalled import installed_from, read_project

pytestmark = pytest.mark.usefixtures("fresh_registry")

PLUGIN = """
from npu_zoo.api import FamilySpec, FeatureRow, VariantSpec, hookimpl


@hookimpl
def register_families() -> list[FamilySpec]:
    row = FeatureRow(
        sizes=("1b",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo"
    )
    return [
        FamilySpec(
            name="orchid",
            title="{title}",
            architectures=("LlamaForCausalLM",),
            model="orchid_plugin.model:Model",
            variants=(VariantSpec(name="1b", size="1b"),),
            default_variant="1b",
            rows=(row,),
        )
    ]
"""
PROJECT = """
[project]
name = "Orchid.Dist"
version = "2.0"

[project.entry-points.npu_zoo]
orchid = "orchid_plugin"
"""
FAMILIES = "from npu_zoo.registry import get_registry; print(*get_registry().families)"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a project, with its module in the directory ``under``."""

    def write(pyproject: str = PROJECT, under: str = "src", title: str = "Orchid") -> Path:
        directory = tmp_path / "project"
        (directory / under).mkdir(parents=True)
        (directory / "pyproject.toml").write_text(pyproject, "utf-8")
        (directory / under / "orchid_plugin.py").write_text(PLUGIN.replace("{title}", title), "utf-8")
        return directory

    yield write
    sys.modules.pop("orchid_plugin", None)


def install(site: Path, distribution: str, title: str) -> None:
    """What pip leaves behind for another version of the plugin."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "orchid_plugin.py").write_text(PLUGIN.replace("{title}", title), "utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[npu_zoo]\norchid = orchid_plugin\n", "utf-8")


def families_of_a_child() -> list[str]:
    done = subprocess.run([sys.executable, "-c", FAMILIES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("under", ["src", "."])
def test_a_directory_s_plugins_are_there_inside_and_gone_afterwards(write: Write, under: str) -> None:
    assert "orchid" not in get_registry().families
    before = (list(sys.path), dict(os.environ))
    with installed_from(write(under=under)) as names:
        assert names == ("orchid",)
        record = get_registry().plugins["orchid"]
        assert (record.error, record.distribution) == (None, "Orchid.Dist 2.0")
        assert get_registry().families["orchid"].title == "Orchid"
        assert "orchid" in families_of_a_child()
    assert "orchid" not in get_registry().families
    assert "orchid_plugin" not in sys.modules
    assert (list(sys.path), dict(os.environ)) == before


def test_they_are_gone_after_an_exception_too(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    before = list(sys.path)
    with contextlib.suppress(RuntimeError), installed_from(write()):
        assert os.environ["PYTHONPATH"].endswith(f"{os.pathsep}/elsewhere")
        raise RuntimeError("a claim does not hold")
    assert os.environ["PYTHONPATH"] == "/elsewhere"
    assert sys.path == before
    assert "orchid" not in get_registry().families


@pytest.mark.parametrize("selection", ["", "another"])
def test_a_selection_of_plugins_takes_them_in(write: Write, monkeypatch: pytest.MonkeyPatch, selection: str) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, selection)
    with installed_from(write()):
        assert "orchid" in get_registry().families
    assert os.environ[PLUGINS_VARIABLE] == selection


def test_the_directory_goes_before_an_installed_version(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "orchid-dist", "Installed")
    monkeypatch.syspath_prepend(tmp_path / "site")
    directory = write(title="From the directory")
    assert get_registry().families["orchid"].title == "Installed"
    assert read_project(directory).installed_version == "1.0"
    installed_module = sys.modules["orchid_plugin"]
    with installed_from(directory):
        assert get_registry().plugins["orchid"].distribution == "Orchid.Dist 2.0"
        assert get_registry().families["orchid"].title == "From the directory"
    assert sys.modules["orchid_plugin"] is installed_module
    assert get_registry().families["orchid"].title == "Installed"


def test_a_namesake_of_another_distribution_is_named(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "tulip-dist", "Another")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(PluginError, match=r"tulip-dist 1\.0 is installed and has a plugin named orchid too"):
        installed_from(write()).__enter__()
    assert get_registry().families["orchid"].title == "Another"


def test_the_version_may_be_found_out_by_the_build(write: Write) -> None:
    directory = write(PROJECT.replace('version = "2.0"', 'dynamic = ["version"]'))
    with installed_from(directory):
        assert get_registry().plugins["orchid"].distribution == "Orchid.Dist 0+dynamic"


def test_a_plugin_that_does_not_load_is_kept_with_its_error(write: Write) -> None:
    directory = write()
    (directory / "src" / "orchid_plugin.py").write_text("raise OSError('no licence')", "utf-8")
    with installed_from(directory):
        assert get_registry().plugins["orchid"].error == "OSError: no licence"


def test_finding_and_checking_brings_no_torch(write: Write) -> None:
    program = f"""
import json, sys
from pathlib import Path
from npu_zoo.uninstalled import installed_from
from npu_zoo.core.config import EngineArgs
with installed_from(Path({str(write())!r})):
    from npu_zoo.dispatch import check
    print(json.dumps([check(EngineArgs(model="orchid:1b", hardware="cpu", dtype="float32")).supported,
                      "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [True, False], done.stderr


POINTS = PROJECT.partition("[project.entry")[0] + "[project.entry-points.npu_zoo]\n"
WRONG = {
    "broken TOML": ("[project", r"pyproject\.toml cannot be parsed: "),
    "no project": ("[build-system]", r"has no table \[project\]"),
    "no name": ("[project]\nversion='1'", r"has nothing as \[project\] name"),
    "a name that is a path": ("[project]\nname='../a'", r"has '\.\./a' as \[project\] name"),
    "a version that is a path": ("[project]\nname='a'\nversion='1/2'", r"has '1/2' as \[project\] version"),
    "another group": (
        POINTS.replace("npu_zoo", "pytest11") + "orchid = 'orchid_plugin'",
        "names no plugin; write NAME",
    ),
    "an empty group": (POINTS, r"names no plugin.*`npu-zoo validate --plugin NAME`"),
    "a path for a module": (POINTS + "orchid = 'src/orchid_plugin.py'", "'orchid' = 'src/orchid_plugin.py'"),
    "a list for a module": (POINTS + "orchid = ['orchid_plugin']", "'orchid' = "),
    "a missing module": (
        POINTS + "orchid = 'orchid_plugin'\nrose = 'roses.plugin:hooks'",
        r"the plugin rose is the module roses\.plugin, and neither .*/src nor .* holds roses/plugin/",
    ),
    "npu-zoo itself": (POINTS + "native = 'npu_zoo.plugins.native'", "is npu-zoo's own"),
}


@pytest.mark.parametrize(("pyproject", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_directory_is_said(write: Write, pyproject: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        installed_from(write(pyproject)).__enter__()


def test_a_directory_without_a_project(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"has no pyproject\.toml; `npu-zoo plugin new NAME` writes a plugin"):
        read_project(tmp_path)
    with pytest.raises(UsageError, match="nowhere is no directory"):
        read_project(tmp_path / "nowhere")
    (tmp_path / "pyproject.toml").mkdir()
    with pytest.raises(PluginError, match=r"cannot read .*pyproject\.toml: Is a directory"):
        read_project(tmp_path)


def test_a_path_that_python_would_split(write: Write) -> None:
    directory = write()
    renamed = directory.rename(directory.with_name("a:b"))
    with pytest.raises(UsageError, match="cannot stand in PYTHONPATH for its ':'"):
        installed_from(renamed).__enter__()
