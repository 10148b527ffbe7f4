"""For pytest: starts the simulated runtime before any conftest can import torch, and reports what a test launched.

``NPU_ZOO_SIMULATE=atlas_800i_a2 pytest`` simulates that product in the whole run; a process has one machine. Without
the variable, tests that ask for :func:`simulated_npu` are skipped; where torch_npu or a C compiler is missing they are
skipped with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from npu_zoo.simulator.activation import VARIABLE, activate_from_environment
from npu_zoo.simulator.errors import SimulatorError, Unavailable

if TYPE_CHECKING:
    from npu_zoo.simulator.report import Report

_MISSING = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Start what the environment names."""
    try:
        activate_from_environment()
        reason = "" if os.environ.get(VARIABLE) else f"{VARIABLE} is unset: it names the product to simulate"
    except Unavailable as error:
        reason = str(error)
    except SimulatorError as error:
        raise pytest.UsageError(str(error)) from error
    early_config.stash[_MISSING] = reason


@pytest.fixture
def simulated_npu(request: pytest.FixtureRequest) -> Iterator[Report]:
    """What the test launches on the simulated device, counted from its start.

    A test in which an operator fell back to the CPU, as it would on real hardware, fails.
    """
    reason = request.config.stash.get(_MISSING, f"{VARIABLE} is unset")
    if reason:
        pytest.skip(reason)
    from npu_zoo.simulator.report import measure

    with measure() as report:
        yield report
    if report.cpu_fallbacks:
        pytest.fail(f"operators fell back to the CPU: {report.cpu_fallbacks}")
