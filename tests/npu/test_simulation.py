"""A matrix row's cell, run on the simulated product as its evidence was."""

from __future__ import annotations

import os

import pytest

from npu_zoo.core.evidence import row_digest
from npu_zoo.registry import get_registry
from npu_zoo.testing.simulation import BOUNDS, Cell, cells_of, run_cell, variant_of

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"


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


@pytest.mark.parametrize("name", ["deepseek_coder"] if DUO else ["deepseek_coder", "deepseek_v3"])
@pytest.mark.usefixtures("simulated_ranks")
def test_a_cell_of_several_devices_agrees_with_its_record(name: str) -> None:
    family = get_registry().families[name]
    row, cell = next((row, cell) for row in family.rows for cell in cells_of(row) if runs_on_two(cell))
    variant = variant_of(family, row)
    assert variant is not None
    result = run_cell(family, variant, cell)
    recorded = next(record for record in family.records if record.row == row_digest(row))
    assert recorded.shape["devices"] == 2
    assert result.passes
    figure = recorded.figures[f"{cell.name}_worst_logprob_difference"]
    assert abs(result.agreement.worst_logprob - figure) < BOUNDS[cell.dtype] / 4


def runs_on_two(cell: Cell) -> bool:
    return cell.hardware == PRODUCT and cell.devices == 2
