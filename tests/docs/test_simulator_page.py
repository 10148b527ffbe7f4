"""docs/simulator.md shows the figures that were measured, and names what exists."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from npu_zoo.settings import PROCESS_VARIABLES
from npu_zoo.simulator import MACHINES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("simulator_benchmark", ROOT / "benchmarks" / "simulator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "simulator.json").read_text())
    measured = re.search(r"simulator\.json\. -->\n\n(.*?)\n<!-- End", PAGE, re.DOTALL)
    assert measured is not None
    assert measured.group(1) == benchmark().to_markdown(record)


def test_every_variable_and_product_is_named() -> None:
    for name in PROCESS_VARIABLES:
        if name.startswith("NPU_ZOO_SIMULATE"):
            assert f"| `{name}` |" in PAGE
    for machine in MACHINES.values():
        assert f"`{machine.name}` ({machine.soc}, {machine.devices} x {machine.memory >> 30} GiB)" in PAGE


def test_every_module_that_is_named_exists() -> None:
    section = PAGE.split("## How it is built")[1]
    for name in re.findall(r"`([\w/]+(?:\.py|\.c|/))`", section):
        assert (ROOT / "npu_zoo" / "simulator" / name).exists(), name
