from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from npu_zoo.core.errors import HardwareError
from npu_zoo.platforms.ascend import chip_of_soc, detect_ascend, parse_npu_smi, visible_devices
from npu_zoo.platforms.detection import detect_products

MIB = 1 << 20

A2 = """
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 88.9        36                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          2790 / 32768         |
+===========================+===============+====================================================+
| 1     910B4               | OK            | 90.1        37                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          2791 / 32768         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""

DUO = """
+--------------------------------------------------------------------------------------------------------+
| npu-smi 23.0.0                                   Version: 23.0.0                                        |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 32      310P3                 | OK              | NA           43                0     / 0             |
| 0       0                     | 0000:82:00.0    | 0            1851 / 44280                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 32      310P3                 | OK              | NA           42                0     / 0             |
| 1       1                     | 0000:82:00.0    | 0            1310 / 43693                            |
+===============================+=================+======================================================+
"""


def driver(root: Path, count: int) -> Path:
    for number in range(count):
        (root / f"davinci{number}").touch()
    (root / "davinci_manager").touch()
    return root


def test_cards_of_one_die() -> None:
    devices = parse_npu_smi(A2)
    assert [(d.card, d.soc, d.memory, d.used) for d in devices] == [
        (0, "910B4", 32768 * MIB, 2790 * MIB),
        (1, "910B4", 32768 * MIB, 2791 * MIB),
    ]


def test_both_dies_of_a_duo_card() -> None:
    devices = parse_npu_smi(DUO)
    assert [(d.card, d.soc, d.memory // MIB) for d in devices] == [(32, "310P3", 44280), (32, "310P3", 43693)]


@pytest.mark.parametrize("text", ["", "dcmi module initialize failed. ret is -8005", A2[:200]])
def test_nothing_is_read_out_of_other_text(text: str) -> None:
    assert parse_npu_smi(text) == []


def test_without_devices_it_is_the_cpu(tmp_path: Path) -> None:
    assert detect_products(driver(tmp_path, 0), lambda: A2) == ("cpu",)


def test_a_chip_of_one_product_and_a_chip_of_two(tmp_path: Path) -> None:
    dev = driver(tmp_path, 2)
    assert detect_products(dev, lambda: DUO) == ("atlas_300i_duo",)
    assert detect_products(dev, lambda: A2) == ("atlas_800i_a2", "atlas_800t_a2")
    assert detect_products(dev, lambda: "") == ("atlas_800i_a2", "atlas_800t_a2", "atlas_300i_duo")


def test_an_unknown_soc_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="the SoC 910_9391, which npu-zoo does not support; it knows 910B1"):
        detect_ascend(driver(tmp_path, 2), lambda: A2.replace("910B4 ", "910_9391"))
    with pytest.raises(HardwareError, match="Ascend950"):
        chip_of_soc("Ascend950")
    assert chip_of_soc("Ascend310P3").name == "ascend310p"


def test_devices_of_several_chips_are_to_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"several chips \(ascend310p, ascend910b\).*ASCEND_RT_VISIBLE_DEVICES"):
        detect_ascend(driver(tmp_path, 4), lambda: A2 + DUO)


@pytest.mark.parametrize(
    ("value", "expected"), [("", None), (" ", None), ("0", [0]), ("3, 1", [3, 1]), ("0,1,2,3", [0, 1, 2, 3])]
)
def test_visible_devices(value: str, expected: list[int] | None) -> None:
    assert visible_devices({"ASCEND_RT_VISIBLE_DEVICES": value}, 4) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0,0", "names device 0 twice"),
        ("0,4", "names device 4; this machine has 0 to 3"),
        ("a", "no list"),
        ("0,", "no list"),
        ("-1", "no list"),
    ],
)
def test_visible_devices_that_cannot_be(value: str, message: str) -> None:
    environ: Mapping[str, str] = {"ASCEND_RT_VISIBLE_DEVICES": value}
    with pytest.raises(HardwareError, match=message):
        visible_devices(environ, 4)
    assert visible_devices({}, 4) is None


def test_a_count_that_is_not_known_refuses_none() -> None:
    assert visible_devices({"ASCEND_RT_VISIBLE_DEVICES": "12"}, None) == [12]
