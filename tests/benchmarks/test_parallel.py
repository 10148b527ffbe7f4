"""The benchmark of several ranks: it counts what ranks tell each other, and its record holds what it promises."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.shapes import SHAPES

from npu_zoo.core.parallel import Split

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("parallel_benchmark", BENCHMARKS / "parallel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


MODELS = json.loads((BENCHMARKS / "parallel.json").read_text())["models"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
def test_the_record(model: dict[str, Any]) -> None:
    first, *rows = model["rows"]
    splits = [(split.describe(), dispatch) for split, dispatch in benchmark().SPLITS[model["kind"]]]
    assert [row["split"] for row in rows] == [name for name, _ in splits]
    for row, (_, dispatch) in zip(rows, splits, strict=True):
        assert row["expert_dispatch"] in (dispatch, "")
        assert row["per_token_and_layer"] == row["per_token_and_layer_due"]
        assert row["beside_layers_per_token"] == row["beside_layers_per_token_due"]
        assert row["weight_bytes"] < first["weight_bytes"]


def test_a_split_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    shape = SHAPES["tiny-moe"]
    system = module.System(shape, module.checkpoint(shape), Split(dp=2, ep=2), "all_to_all")
    try:
        found = module.communication(system)
        sample = system.sample()
    finally:
        system.llm.shutdown()
    assert found["per_token_and_layer"] == found["per_token_and_layer_due"] > 0
    assert sample.prefill > 0
    assert all(rate > 0 for rate in sample.decode.values())
