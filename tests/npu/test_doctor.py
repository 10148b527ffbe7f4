"""What `npu-zoo doctor` reads in torch_npu's files, against what the loaded torch_npu has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch_npu

from npu_zoo.platforms.operators import present_operators
from npu_zoo.registry import get_registry

FOLDER = Path(torch_npu.__file__).parent
PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")


def test_operators_in_the_files_are_those_of_the_dispatcher() -> None:
    registered = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name.partition(".")[0] for space, _, name in registered if space in ("npu", "atb")}
    names = {name for name in sorted(names)[::8] if name.startswith(("npu_", "_npu_"))}
    assert len(names) > 30
    assert present_operators(FOLDER, names) == names
    assert present_operators(FOLDER, [f"{name}_of_tomorrow" for name in sorted(names)[:5]]) == set()


def test_what_the_specs_name_is_there() -> None:
    registry = get_registry()
    specs = [*registry.kernels.values(), *registry.attention_backends.values()]
    named = {operator for spec in specs for operator in spec.operators}
    assert named
    assert [name for name in sorted(named) if not hasattr(torch_npu, name)] == []
    assert present_operators(FOLDER, named) == named


def test_doctor_finds_nothing_wrong_with_the_simulated_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "npu_zoo", "doctor", "--hardware", PRODUCT, "--model", "deepseek_coder", "--json"],
        env={**os.environ, "NPU_ZOO_SIMULATE": PRODUCT},
        capture_output=True,
        text=True,
        check=False,
    )
    findings = json.loads(done.stdout)["findings"]
    assert [finding for finding in findings if finding["status"] == "problem"] == [], done.stderr
    assert "sees 8 devices" in str([f["message"] for f in findings if f["topic"] == "torch_npu"])
