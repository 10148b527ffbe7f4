"""The machines that can be simulated, as data."""

from __future__ import annotations

from dataclasses import dataclass

from npu_zoo.simulator.errors import SimulatorError

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One product.

    Attributes:
        name: the value of ``NPU_ZOO_SIMULATE``.
        chip: what operator rules are keyed by.
        soc: the name that AscendCL reports; torch_npu derives its SoC code from it.
        devices: how many devices a full machine shows.
        memory: bytes of memory per device.
        ai_cores, vector_cores, l2_bytes: what AscendCL's device capabilities report.
        source: where the figures are from.
    """

    name: str
    chip: str
    soc: str
    devices: int
    memory: int
    ai_cores: int
    vector_cores: int
    l2_bytes: int
    source: str


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            "atlas_800i_a2", "ascend910b", "Ascend910B4", 8, 32 * GIB, 20, 40, 96 << 20,
            "Atlas 800I A2 product page (8 x 32 GB model); platform configuration Ascend910B4 of CANN",
        ),
        Machine(
            "atlas_800t_a2", "ascend910b", "Ascend910B3", 8, 64 * GIB, 20, 40, 192 << 20,
            "Atlas 800T A2 product page (8 x 64 GB); platform configuration Ascend910B3 of CANN",
        ),
        Machine(
            "atlas_300i_duo", "ascend310p", "Ascend310P3", 8, 48 * GIB, 8, 7, 16 << 20,
            "Atlas 300I Duo product page (96 GB a card of two dies; four cards); platform configuration Ascend310P3",
        ),
    )
}  # fmt: skip


def machine_of(name: str) -> Machine:
    """The machine of a name.

    Raises:
        SimulatorError: there is none of that name.
    """
    if name not in MACHINES:
        raise SimulatorError(f"cannot simulate '{name}'; there are: {', '.join(MACHINES)}")
    return MACHINES[name]
