from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
SCRIPT = Path(__file__).parents[2] / "scripts" / "npu_launches.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("npu_launches", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_a_step_launches() -> None:
    script = load()
    if PRODUCT not in script.FAMILIES:
        pytest.skip(f"docs/npu.md has no part of {PRODUCT}")
    assert script.committed(PRODUCT).rstrip() == script.section(PRODUCT).rstrip()
