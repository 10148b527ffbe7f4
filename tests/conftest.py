"""What every test stands on: no network, no settings of the user's, and where the test data lies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TEST_DATA_VARIABLE = "NPU_ZOO_TEST_DATA"

# A loaded machine must not fail a property; a failure in CI must come again on the next run.
settings.register_profile("test", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("verify", settings.get_profile("test"), derandomize=False, max_examples=500)
settings.load_profile("test")

# Hundreds of processes import the package; the first of them compiles it, whatever is set on this machine.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts commands in the background with Ctrl-C ignored, and their children would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """For the session, since fixtures of the session start servers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("NPU_ZOO_") and name != TEST_DATA_VARIABLE:
                patch.delenv(name)
        yield


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """This process's registry is built anew in the test, and again after it."""
    from npu_zoo.registry import get_registry

    get_registry.cache_clear()
    yield
    get_registry.cache_clear()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data that is not part of the repository; a test that asks for it skips where it is unset."""
    value = os.environ.get(TEST_DATA_VARIABLE)
    if not value:
        pytest.skip(f"{TEST_DATA_VARIABLE} is unset: it names the folder of test data that the repository may not hold")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{TEST_DATA_VARIABLE}={value} is no folder")
    return folder
