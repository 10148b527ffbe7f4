"""``explain --simulate`` where nothing can be simulated; tests/npu runs it where it can."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from npu_zoo.cli import main


def test_a_cpu_has_no_launches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "deepseek_coder", "--hardware", "cpu", "--simulate"]) == 2
    assert "not of cpu; name one with --hardware" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_without_torch_npu_it_says_what_to_install() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "NPU_ZOO_SIMULATE"}
    asked = ["explain", "--model", "deepseek_coder", "--hardware", "atlas_800i_a2", "--simulate"]
    done = subprocess.run(
        [sys.executable, "-m", "npu_zoo", *asked], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "cannot be simulated here: torch_npu is not installed" in done.stderr
