"""``explain --simulate`` where nothing can be simulated; tests/npu runs it where it can."""

from __future__ import annotations

import importlib.util

import pytest

from npu_zoo.cli import main


def test_a_cpu_has_no_launches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "deepseek_coder", "--hardware", "cpu", "--simulate"]) == 2
    assert "not of cpu; name one with --hardware" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_without_torch_npu_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NPU_ZOO_SIMULATE", raising=False)
    assert main(["explain", "--model", "deepseek_coder", "--hardware", "atlas_800i_a2", "--simulate"]) == 4
    text = capsys.readouterr().err
    assert "cannot be simulated here" in text
    assert "torch_npu is not installed" in text
