"""A matrix row's cell, run on the simulated product as its evidence was."""

from __future__ import annotations

import os

import pytest

from npu_zoo.registry import get_registry
from npu_zoo.testing.simulation import BOUNDS, cells_of, run_cell

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")


@pytest.mark.parametrize("name", ["deepseek_coder", "wizardcoder"])
def test_a_cell_agrees_with_its_record(name: str) -> None:
    family = get_registry().families[name]
    variant = next(v for v in family.variants if v.bundled)
    cells = [c for row in family.matrix.of_size(variant.size) for c in cells_of(row) if c.hardware == PRODUCT]
    result = run_cell(family, variant, cells[0])
    figure = f"{PRODUCT}_{cells[0].dtype}_{cells[0].attention}_worst_logprob_difference"
    recorded = next(record.figures[figure] for record in family.records if figure in record.figures)
    assert result.passes
    assert abs(result.agreement.worst_logprob - recorded) < BOUNDS[cells[0].dtype] / 4
