from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from npu_zoo.simulator.activation import refuse_real_hardware
from npu_zoo.simulator.errors import SimulatorError

REAL = [
    ({"ASCEND_HOME_PATH": "/usr/local/Ascend"}, "ASCEND_HOME_PATH=/usr/local/Ascend"),
    ({"ASCEND_TOOLKIT_HOME": "/x"}, "ASCEND_TOOLKIT_HOME=/x"),
]


@pytest.mark.parametrize(("environ", "named"), REAL)
def test_a_real_cann_is_refused(environ: Mapping[str, str], named: str, tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match=named):
        refuse_real_hardware(environ, tmp_path)


def test_a_real_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    refuse_real_hardware({}, tmp_path)
    (tmp_path / "dev" / "davinci0").touch()
    with pytest.raises(SimulatorError, match="davinci0"):
        refuse_real_hardware({}, tmp_path)


def test_a_real_library_on_the_path_is_refused(tmp_path: Path) -> None:
    environ = {"LD_LIBRARY_PATH": f"/nowhere::{tmp_path}"}
    refuse_real_hardware(environ, tmp_path)
    (tmp_path / "libascendcl.so").touch()
    with pytest.raises(SimulatorError, match="libascendcl"):
        refuse_real_hardware(environ, tmp_path)


def python(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_product_is_named_with_those_that_exist() -> None:
    done = python("import npu_zoo.simulator as s; s.activate('atlas_900')")
    assert "cannot simulate 'atlas_900'; there are: atlas_800i_a2, atlas_800t_a2, atlas_300i_duo" in done.stderr


def test_it_must_come_before_torch() -> None:
    done = python("import torch, npu_zoo.simulator as s; s.activate('atlas_800i_a2')")
    assert "torch has been imported already" in done.stderr


def test_without_torch_npu_the_reason_is_given() -> None:
    done = python("import npu_zoo.simulator as s; s.activate('atlas_800i_a2')")
    assert "Unavailable: torch_npu is not installed" in done.stderr


def test_the_command_line_says_why_in_one_line() -> None:
    done = command("npu_zoo", "list", NPU_ZOO_SIMULATE="atlas_900")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: cannot simulate 'atlas_900'")
    assert len(done.stderr.splitlines()) == 1
    done = command("npu_zoo", "list", NPU_ZOO_SIMULATE="atlas_800i_a2", NPU_ZOO_SIMULATE_DEVICES="many")
    assert "NPU_ZOO_SIMULATE_DEVICES=many is no number" in done.stderr


def test_the_library_says_so_before_it_imports_torch() -> None:
    done = python("from npu_zoo import LLM", NPU_ZOO_SIMULATE="atlas_900")
    assert "cannot simulate 'atlas_900'" in done.stderr


def test_tests_skip_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(simulated_npu): pass\n")
    for environ, reason in (
        ({}, "NPU_ZOO_SIMULATE is unset"),
        ({"NPU_ZOO_SIMULATE": "atlas_800i_a2"}, "torch_npu is not installed"),
    ):
        done = command("pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path), **environ)
        assert done.returncode == 0
        assert reason in done.stdout
    done = command("pytest", str(tmp_path), NPU_ZOO_SIMULATE="atlas_900")
    assert done.returncode != 0
    assert "cannot simulate" in done.stderr


def test_running_nothing_shows_the_usage() -> None:
    done = command("npu_zoo.simulator", "atlas_800i_a2")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m npu_zoo.simulator {atlas_800i_a2,")
