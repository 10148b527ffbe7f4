"""What rows claim of the hardware at hand: run there, timed, and held against the CPU."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.hardware import PRODUCTS, chip_of
from npu_zoo.core.specs import FamilySpec
from npu_zoo.platforms.ascend import ascend_devices
from npu_zoo.platforms.detection import detect_products
from npu_zoo.platforms.toolkit import cann_home, cann_version, driver_version
from npu_zoo.registry import get_registry
from npu_zoo.testing.simulation import Cell, decode_rate, measured_cells, run_cell, variant_of
from npu_zoo.testing.validation.claims import Claim, Figures
from npu_zoo.testing.validation.scope import Part
from npu_zoo.testing.validation.simulate import VARIABLE, figures_of


def products_at_hand(asked: str | None) -> tuple[str, ...]:
    """The product that this machine is.

    Args:
        asked: what the user says that it is, where its devices are those of several.

    Raises:
        UsageError: it is simulated, or the zoo knows no product of that name.
        HardwareError: the machine's devices are those of several products, or of others than was said.
    """
    if os.environ.get(VARIABLE):
        raise UsageError(
            f"{VARIABLE} is set, and a simulated device measures nothing; unset it, or take --level simulate"
        )
    if asked is not None and asked not in PRODUCTS:
        raise UsageError(f"unknown hardware '{asked}'; known: {', '.join(PRODUCTS)}")
    found = detect_products()
    if asked is not None and asked not in (*found, "cpu"):
        raise HardwareError(f"--hardware {asked}, and this machine's devices are those of {' or '.join(found)}")
    if asked is None and len(found) > 1:
        raise HardwareError(
            f"this machine's devices are those of {' and '.join(found)}; name it: --hardware {found[0]}"
        )
    return (asked,) if asked else found


def claims(part: Part, products: Sequence[str]) -> Iterator[Claim]:
    """The combinations of one plugin's rows that some products can be asked for."""
    for family in part.families:
        for _, row in part.rows(family):
            yield from _row_claims(part, family, row, products)


def _row_claims(part: Part, family: FamilySpec, row: FeatureRow, products: Sequence[str]) -> Iterator[Claim]:
    variant = variant_of(family, row)
    if variant is None:
        return
    for product in products:
        for cell in measured_cells(row, product, _devices(product)):
            check = functools.partial(_measure, family.name, variant.name, cell)
            yield Claim("run", part.subject(family, row).on("hardware"), f"measured: {cell.name}", check, apart=True)


def _devices(product: str) -> int:
    kind = chip_of(product).device
    return len(ascend_devices()) if kind == "npu" else 1


def _measure(family_name: str, variant_name: str, cell: Cell) -> Figures:
    family = get_registry().families[family_name]
    variant = family.variant(variant_name)
    assert variant is not None
    begin = time.monotonic()
    figures = figures_of(run_cell(family, variant, cell))
    rate = decode_rate(family, variant, cell)
    return {**figures, "decode_tokens_per_s": round(rate, 1), "seconds": round(time.monotonic() - begin, 1)}


def nothing_to_measure(parts: Iterable[Part], products: Sequence[str]) -> HardwareError:
    """Why no row can be measured here."""
    wanted = {name for part in parts for family in part.families for row in family.rows for name in row.hardware}
    named = ", ".join(sorted(wanted))
    return HardwareError(f"this machine is {' or '.join(products)}, and rows are for {named}: nothing to measure")


def versions() -> dict[str, str]:
    """The hardware and its software, as far as they are there."""
    root = Path("/")
    home = cann_home(root, os.environ)
    found = {"cpu": platform.machine(), "driver": driver_version(root), "cann": cann_version(home) if home else ""}
    return {name: version for name, version in {**found, "soc": _soc()}.items() if version}


def _soc() -> str:
    if detect_products() == ("cpu",):
        return ""
    from npu_zoo.platforms.ascend import parse_npu_smi, run_npu_smi

    names = {device.soc for device in parse_npu_smi(run_npu_smi())}
    return ", ".join(sorted(names))
