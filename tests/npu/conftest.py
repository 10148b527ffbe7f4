"""Tests that run on the simulated device: one process per product, which NPU_ZOO_SIMULATE names (`make test-npu`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from npu_zoo.simulator import simulated_machine

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
if simulated_machine() is None:  # nothing is named, or torch_npu or a compiler is missing, which the plugin says
    collect_ignore_glob = ["*"]


def pytest_configure(config: pytest.Config) -> None:
    """What torch_npu says of itself, once a process, is nothing that a test did."""
    for message in ("Cannot create tensor with internal format", "Device do not support double dtype", "TypedStorage"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """What an engine presets stays out of the processes that other tests start."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _counted(simulated_npu: object) -> None:
    """Every test here runs on the device, and fails where an operator falls back to the CPU."""


@pytest.fixture
def simulated_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of other ranks simulate the product too."""
    monkeypatch.setenv("NPU_ZOO_SIMULATE", PRODUCT)
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "61000")  # the default ones are among those that any process is given


@pytest.fixture
def chip() -> str:
    """``ascend910b`` or ``ascend310p``."""
    return "ascend310p" if PRODUCT == "atlas_300i_duo" else "ascend910b"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``@pytest.mark.chip("ascend910b")`` runs a test on that chip alone."""
    here = "ascend310p" if PRODUCT == "atlas_300i_duo" else "ascend910b"
    for item in list(items):
        marker = item.get_closest_marker("chip")
        if marker is not None and here not in marker.args:
            items.remove(item)
