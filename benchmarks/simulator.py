"""What the simulated Ascend runtime costs: to build, to start, and per operator.

Run it with the Python that has torch_npu, such as .venv-npu/bin/python benchmarks/simulator.py --json
benchmarks/simulator.json. Each figure is the median of several rounds; the CPU's figure is taken in the same round.
These are costs of testing, on the machine at hand. They say nothing of an NPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRODUCT = "atlas_800i_a2"
ROUNDS = 5
CALLS = 500

IMPORT_TORCH = "import torch"
IMPORT_BOTH = "import npu_zoo.simulator as s; s.activate('atlas_800i_a2'); import torch; torch.ones(1, device='npu')"


def seconds_of(script: str, **environ: str) -> float:
    """Wall time of a fresh interpreter that runs a script."""
    start = time.perf_counter()
    command = [sys.executable, "-c", script]
    subprocess.run(command, env={**os.environ, **environ}, check=True, capture_output=True)
    return time.perf_counter() - start


def start_up() -> dict[str, float]:
    """Seconds: building the stub, importing torch alone, importing torch with the simulated device and using it."""
    rows: dict[str, list[float]] = {"torch alone": [], "simulated": [], "simulated, stub not built yet": []}
    for _ in range(ROUNDS):
        rows["torch alone"].append(seconds_of(IMPORT_TORCH, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
        rows["simulated"].append(seconds_of(IMPORT_BOTH))
        with tempfile.TemporaryDirectory() as cache:
            rows["simulated, stub not built yet"].append(seconds_of(IMPORT_BOTH, XDG_CACHE_HOME=cache))
    return {name: statistics.median(values) for name, values in rows.items()}


def microseconds(work: Callable[[], object]) -> float:
    """Mean time of a call, in microseconds."""
    for _ in range(20):
        work()
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - start) / CALLS * 1e6


def per_operator() -> dict[str, dict[str, float]]:
    """Microseconds a call on the simulated device and on the CPU, for small tensors."""
    from npu_zoo.simulator import activate

    activate(PRODUCT)
    import torch
    import torch_npu

    x, w = torch.randn(4, 64), torch.randn(64, 64)
    dx, dw, gamma = x.npu(), w.npu(), torch.ones(64).npu()
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "add": (lambda: dx + dx, lambda: x + x),
        "add in place": (lambda: dx.add_(0), lambda: x.add_(0)),
        "matmul": (lambda: dx @ dw, lambda: x @ w),
        "softmax": (lambda: dx.softmax(-1), lambda: x.softmax(-1)),
        "npu_rms_norm": (
            lambda: torch_npu.npu_rms_norm(dx, gamma),
            lambda: torch.nn.functional.rms_norm(x, (64,)),
        ),
        "decode step of a 2-layer LlamaForCausalLM": decode_steps(),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"simulated": [], "cpu": []} for name in cases}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, (device, host) in cases.items():
                found[name]["simulated"].append(microseconds(device))
                found[name]["cpu"].append(microseconds(host))
    return {name: {where: statistics.median(v) for where, v in row.items()} for name, row in found.items()}


def decode_steps() -> tuple[Callable[[], object], Callable[[], object]]:
    """One token through a small model, on the device and on the CPU."""
    import copy

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    host = LlamaForCausalLM(config).eval()
    device = copy.deepcopy(host).npu()
    ids = torch.tensor([[5]])
    moved = ids.npu()
    return (lambda: device(moved, use_cache=False).logits), (lambda: host(ids, use_cache=False).logits)


def measure() -> dict[str, Any]:
    """The whole record."""
    start = start_up()
    operators = per_operator()
    from importlib.metadata import version

    return {
        "machine": f"{os.cpu_count()} virtual cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "torch-npu", "transformers")},
        "python": platform.python_version(),
        "product": PRODUCT,
        "rounds": ROUNDS,
        "start_seconds": start,
        "operator_microseconds": operators,
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as the tables of docs/simulator.md."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"Medians of {record['rounds']} rounds on {record['machine']}, Python {record['python']}, {versions}.",
        "",
        "| from process start to the first tensor on the device | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in record["start_seconds"].items()),
        "",
        "| one call, small tensors | simulated, µs | CPU, µs |",
        "|---|---|---|",
        *(
            f"| {name} | {row['simulated']:.0f} | {row['cpu']:.0f} |"
            for name, row in record["operator_microseconds"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and keep the record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the record is written")
    arguments = parser.parse_args()
    record = measure()
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(to_markdown(record))


if __name__ == "__main__":
    main()
