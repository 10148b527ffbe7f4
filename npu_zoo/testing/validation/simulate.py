"""What rows on NPUs claim: their combinations on the simulated runtime, against the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import npu_zoo
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import get_registry
from npu_zoo.testing.simulation import MOST_DEVICES, Cell, CellResult, cells_of, run_cell, variant_of
from npu_zoo.testing.validation.claims import CannotTell, Claim, ClaimFails, Figures
from npu_zoo.testing.validation.scope import Part

VARIABLE = "NPU_ZOO_SIMULATE"
ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::UserWarning",  # torch_npu warns of itself, once a process
    "HCCL_IF_BASE_PORT": "61000",  # the default ones are among those that any process is given
}
"""What a process that simulates a product has beside its name."""


def claims(part: Part) -> Iterator[Claim]:
    """The claims of one plugin."""
    for family in part.families:
        for _, row in part.rows(family):
            yield from _row_claims(part, family, row)


def _row_claims(part: Part, family: FamilySpec, row: FeatureRow) -> Iterator[Claim]:
    subject = part.subject(family, row).on("hardware")
    if not any(chip_of(hardware).device == "npu" for hardware in row.hardware):
        return
    variant, cells = variant_of(family, row), cells_of(row)
    if variant is None or not cells:
        reason = (
            f"it takes {min(row.world_size)} devices, and up to {MOST_DEVICES} are simulated"
            if variant
            else "no variant of the family has hyperparameters"
        )
        yield Claim("simulate", subject, "agrees with the CPU on simulated devices", functools.partial(_cannot, reason))
        return
    for cell in cells:
        check = functools.partial(_agrees, family.name, variant.name, cell)
        yield Claim("simulate", subject, f"agrees with the CPU: {cell.name}", check, True, simulates=cell.hardware)


def _cannot(reason: str) -> Figures:
    raise CannotTell(reason)


def _agrees(family_name: str, variant_name: str, cell: Cell) -> Figures:
    require_simulation()
    family = get_registry().families[family_name]
    variant = family.variant(variant_name)
    assert variant is not None
    return figures_of(run_cell(family, variant, cell))


def figures_of(result: CellResult) -> Figures:
    """The figures of a cell's runs, with its name.

    Raises:
        ClaimFails: it does not agree with the CPU.
    """
    agreement, bound = result.agreement, result.cell.bound
    if not result.passes:
        raise ClaimFails(
            f"log-probabilities differ from the CPU's by up to {agreement.worst_logprob:.3g}, by "
            f"{agreement.mean_logprob:.3g} on average, and ties by {agreement.worst_gap:.3g}; {bound:g} is allowed, a "
            "quarter of it on average"
        )
    return {
        "cell": result.cell.name,
        "devices": result.cell.devices,
        "worst_logprob_difference": round(agreement.worst_logprob, 4),
        "mean_logprob_difference": round(agreement.mean_logprob, 5),
        "tokens": agreement.tokens,
    }


def require_simulation() -> None:
    """Start the simulated runtime that the environment names.

    Raises:
        CannotTell: it cannot be started here; says what is missing.
    """
    if not os.environ.get(VARIABLE):
        raise CannotTell(f"{VARIABLE} is unset: it names the product to simulate")
    try:
        npu_zoo.simulate()
    except RuntimeError as error:  # the simulator stands alone, so its errors are not of the package's tree
        raise CannotTell(str(error)) from error
