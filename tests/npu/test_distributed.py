from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
WORKER = Path(__file__).with_name("distributed_worker.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(("size", "store"), [(1, "env"), (2, "tcp"), (4, "file")])
def test_collectives_equal_closed_forms(size: int, store: str, tmp_path: Path) -> None:
    port = free_port()
    method = {"env": "env://", "tcp": f"tcp://127.0.0.1:{port}", "file": f"file://{tmp_path / 'store'}"}[store]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "npu_zoo.simulator", PRODUCT, str(WORKER)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), method],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
