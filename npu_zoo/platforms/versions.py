"""Which versions go together: torch_npu with torch, CANN and Python, CANN with the driver, each row with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMPATIBILITY = "Ascend/pytorch at 9e73e70, COMPATIBILITY.en.md"
_TO_313 = ("3.10", "3.11", "3.12", "3.13")
_TO_314 = (*_TO_313, "3.14")


@dataclass(frozen=True)
class Release:
    """A release of torch_npu.

    Attributes:
        torch_npu, torch: their versions; major and minor are the same.
        cann: the CANN release that it goes with; empty where no document names one yet.
        pythons: the Pythons that it is built for; empty where no document names them yet.
        source: the document that says so.
    """

    torch_npu: str
    torch: str
    cann: str
    pythons: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class DriverMinimum:
    """The oldest driver (Ascend HDK) that a release series of CANN works with.

    Attributes:
        cann: major and minor.
        driver: major and minor.
        source: the document that says so.
    """

    cann: str
    driver: str
    source: str


@dataclass(frozen=True)
class Range:
    """The versions of a package that npu-zoo takes: ``least`` and later, before ``below``."""

    least: str
    below: str

    def holds(self, version: str) -> bool:
        """Whether a version lies in it."""
        return numbers(self.least) <= numbers(version) < numbers(self.below)

    def __str__(self) -> str:
        return f">={self.least},<{self.below}"


RELEASES: tuple[Release, ...] = (
    Release("2.14.0", "2.14.0", "", (), "Ascend/pytorch at 9e73e70, version.txt and SUPPORT.en.md (planned)"),
    Release("2.13.0", "2.13.0", "", _TO_314, f"{_COMPATIBILITY} (Python alone); version.txt"),
    Release("2.12.0", "2.12.0", "9.1.0", _TO_314, _COMPATIBILITY),
    Release("2.11.0", "2.11.0", "9.1.0", _TO_314, _COMPATIBILITY),
    Release("2.10.0.post4", "2.10.0", "9.1.0", _TO_313, _COMPATIBILITY),
    Release("2.10.0.post2", "2.10.0", "9.0.0", _TO_313, "Ascend/pytorch at 9e73e70, README.md"),
    Release("2.10.0", "2.10.0", "9.0.0", _TO_313, "Ascend/pytorch at 9e73e70, docs/zh, installation_via_pip.md"),
    Release("2.9.0.post6", "2.9.0", "9.1.0", _TO_313, _COMPATIBILITY),
    Release("2.9.0.post2", "2.9.0", "9.0.0", _TO_313, _COMPATIBILITY),
    Release("2.9.0", "2.9.0", "8.5.0", _TO_313, _COMPATIBILITY),
)  # fmt: skip
"""Newest first."""

DRIVERS: tuple[DriverMinimum, ...] = (
    DriverMinimum("9.1", "25.2", "CANN 9.1.0 release notes, table of CANN and Ascend HDK (hiascend.com)"),
    DriverMinimum("9.0", "25.0", "CANN 9.1.0 release notes, table of CANN and Ascend HDK (hiascend.com)"),
    DriverMinimum("8.5", "25.0", "CANN 8.5.0 release notes, mapping of CANN and driver versions (hiascend.com)"),
)

PYTHON = "3.10"
"""The oldest Python that npu-zoo runs on."""

SUPPORTED: dict[str, Range] = {
    "torch": Range("2.9", "2.15"),
    "torch_npu": Range("2.9", "2.15"),
    "transformers": Range("5.20", "6"),
}
"""What pyproject.toml asks for."""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of 2.13.0+cpu, (8, 3) of 8.3.RC1; empty where there are none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def minor(version: str) -> str:
    """Major and minor: 2.13 of 2.13.0+cpu."""
    return ".".join(map(str, numbers(version)[:2]))


def releases_of(torch_npu: str) -> list[Release]:
    """The row of a torch_npu; where it has none, the rows of the same torch; newest first."""
    public = torch_npu.partition("+")[0]
    exact = [release for release in RELEASES if release.torch_npu == public]
    return exact or [release for release in RELEASES if numbers(release.torch_npu) == numbers(torch_npu)]


def pythons_of(torch_npu: str) -> tuple[str, ...]:
    """The Pythons that a torch_npu is built for; empty where that is not known."""
    return next((release.pythons for release in RELEASES if minor(release.torch_npu) == minor(torch_npu)), ())


def newest_cann() -> str:
    """The newest CANN that a row names."""
    return max((release.cann for release in RELEASES if release.cann), key=numbers)


def least_driver(cann: str) -> str:
    """The oldest driver that a CANN works with; empty where no row speaks of it."""
    return next((row.driver for row in DRIVERS if row.cann == minor(cann)), "")
