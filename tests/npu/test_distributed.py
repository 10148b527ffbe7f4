from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives_equal_closed_forms(size: int, tmp_path: Path) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "npu_zoo.simulator", PRODUCT, str(WORKER)),
                *(str(rank), str(size), str(tmp_path / "store")),
            ],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
