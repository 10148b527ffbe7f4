"""The suite as pytest runs it, and what merely having the plugin installed costs."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Run = Callable[..., Any]

FAULTY = """
FAMILY = family({}, {'hardware': ('atlas_300i_duo',), 'dtype': ('bfloat16',)})
KERNELS = [kernel('{name}_kernel', '{name}.kernels:scale', chip="ascend310p", requires=("nowhere",))]
"""
OTHER_TEST = "def test_of_another():\n    pass\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, install: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "sound")
    install(folder, "faulty", FAULTY, **{"kernels.py": "def scale(x):\n    return x\n"})
    (folder / "project" / "tests").mkdir(parents=True)
    (folder / "project" / "tests" / "test_other.py").write_text(OTHER_TEST)
    (folder / "project" / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    return folder


@pytest.fixture
def run(site: Path, site_environment: Callable[..., dict[str, str]]) -> Run:
    def pytest_of(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        environment = site_environment(site)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, cwd=site / "project"
        )

    return pytest_of


def test_one_test_a_claim_with_readable_names(run: Run) -> None:
    ran = run("--npu-zoo-plugin", "sound", "--npu-zoo-level", "spec", "-v")
    assert ran.returncode == 0, ran.stdout
    assert "8 passed" in ran.stdout
    assert "test_of_another" not in ran.stdout
    lines = [line.partition(" PASSED")[0] for line in ran.stdout.splitlines() if " PASSED" in line]
    assert "npu-zoo:sound::spec: sound row 1: 1b on cpu in float32: its chips have its dtypes" in lines


def test_failures_tell_row_and_axis_and_what_cannot_be_told_skips(run: Run, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    ran = run("--npu-zoo-plugin", "faulty", "--npu-zoo-level", "build", "-rs", f"--junit-xml={junit}")
    assert ran.returncode == 1
    assert "faulty row 2: 1b on atlas_300i_duo in bfloat16" in ran.stdout
    assert "axis: dtype" in ran.stdout
    assert "atlas_300i_duo has no bfloat16: ascend310p computes in float32, float16" in ran.stdout
    assert "it requires nowhere, which is not installed here" in ran.stdout
    assert "Traceback" not in ran.stdout
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.attrib["failures"], suite.attrib["skipped"], suite.attrib["errors"]) == ("1", "1", "0")


def test_a_plugin_that_is_not_there_is_a_usage_error(run: Run) -> None:
    for more in ((), ("-n", "2")):
        ran = run("--npu-zoo-plugin", "orchid", *more)
        assert ran.returncode == 4, ran.stdout
        said = ran.stdout + ran.stderr
        assert "no plugin is named 'orchid'; installed: " in said
        assert "INTERNALERROR" not in said


@pytest.mark.long
def test_tests_are_chosen_by_name_and_shared_among_processes(run: Run) -> None:
    arguments = ("--npu-zoo-plugin", "sound", "--npu-zoo-plugin", "faulty", "--npu-zoo-level", "spec")
    chosen = run(*arguments, "-k", "row and 1 and not evidence", "-q", "--collect-only")
    collected = [line for line in chosen.stdout.splitlines() if line.startswith("npu-zoo:")]
    assert collected
    assert all("row 1" in line or " row" in line for line in collected)
    alone, shared = run(*arguments, "-q"), run(*arguments, "-q", "-n", "2")
    assert _counts(alone.stdout) == _counts(shared.stdout)
    assert (alone.returncode, shared.returncode) == (1, 1)


def _counts(text: str) -> dict[str, int]:
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", text.splitlines()[-1])}


@pytest.mark.long
def test_files_that_are_named_run_beside_the_suite(run: Run) -> None:
    ran = run("--npu-zoo-plugin", "sound", "--npu-zoo-level", "spec", "tests/test_other.py")
    assert "9 passed" in ran.stdout


IMPORTS_TEST = """
import sys


def test_it():
    packages = ("npu_zoo", "torch", "transformers", "pebble")
    found = {name for name in sys.modules if name.partition(".")[0] in packages}
    simulator = {name for name in found if name.startswith("npu_zoo.simulator")}  # a pytest plugin of its own
    assert found - simulator == {"npu_zoo", "npu_zoo.testing", "npu_zoo.testing.pytest_plugin"}
"""


def test_without_the_option_nothing_of_the_package_is_imported(site: Path, run: Run) -> None:
    file = site / "project" / "test_imports.py"
    file.write_text(IMPORTS_TEST)
    ran = run(str(file), "-q")
    assert ran.returncode == 0, ran.stdout


REGISTRY_TEST = """
import pytest
import faulty, sound
from npu_zoo.registry import get_registry
from npu_zoo.testing import isolated_registry as isolated


def test_the_fixture(isolated_registry):
    before = get_registry()
    registry = isolated_registry(sound)
    assert get_registry() is registry
    assert (list(registry.plugins), list(registry.families)) == (["native", "sound"], ["sound"])


def test_it_ends_with_the_test():
    assert "wizardcoder" in get_registry().families


def test_the_context_manager():
    with isolated(sound) as registry:
        assert list(registry.families) == ["sound"]
        with isolated() as inner:
            assert list(inner.families) == []
        assert get_registry() is registry
    assert "wizardcoder" in get_registry().families


def test_a_plugin_that_does_not_load():
    class Twice:
        register_families = staticmethod(sound.register_families)

    with pytest.raises(AssertionError, match="is taken by plugin sound"), isolated(sound, Twice()):
        pass
    with pytest.raises(AssertionError, match="the plugin name 'sound' is taken"), isolated(sound, sound):
        pass
"""


@pytest.mark.long
def test_registries_of_single_plugins(site: Path, run: Run) -> None:
    file = site / "project" / "test_registry.py"
    file.write_text(REGISTRY_TEST)
    ran = run(str(file), "-q", "-W", "error")
    assert ran.returncode == 0, ran.stdout
