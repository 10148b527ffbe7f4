"""Convert a synthetic checkpoint of some GB under a memory limit, beside a plain copy of its files.

    python benchmarks/convert.py [--gigabytes 6] [--folder DIR] [--rounds 3] [--record benchmarks/convert.json]

The limit is 2 GiB plus twice the largest tensor, set as RLIMIT_DATA, which counts all memory that is not a mapped file.
Each round copies the files, then converts them; rates are of the source's bytes, ratios of the same round. The floor of
a conversion is reading the source and writing the result; it hashes both as well, which a copy does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
FEED_FORWARD = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
VOCABULARY = (32256, 4096)
CASES = {
    "float32 to bfloat16": ["--to", "hf-safetensors", "--dtype", "bfloat16"],
    "float32 to 4 ranks in bfloat16": ["--to", "ascend-mp", "--tp", "4", "--dtype", "bfloat16"],
    "float32 to int8": ["--to", "hf-safetensors", "--dtype", "bfloat16", "--quantize", "w8a16"],
    "float32 to MindSpore": ["--to", "mindspore-ckpt"],
}


def write_synthetic(folder: Path, size: int) -> int:
    """A Llama-shaped checkpoint of about ``size`` bytes in float32; returns the largest tensor's bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, generator=generator)
    save_file({"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(4096)}, folder / "a.safetensors")
    written, layer = table.nbytes, 0
    while written < size:
        prefix = f"model.layers.{layer}"
        shapes = {f"{prefix}.self_attn.{n}.weight": s for n, s in LAYER.items()}
        shapes |= {f"{prefix}.mlp.{n}.weight": s for n, s in FEED_FORWARD.items()}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{prefix}.{name}.weight": torch.ones(4096) for name in norms}
        save_file(tensors, folder / f"layer{layer:03d}.safetensors")
        written += sum(t.nbytes for t in tensors.values())
        layer += 1
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": layer, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY[0],
        "max_position_embeddings": 4096, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return table.nbytes


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy of all files."""
    start = time.monotonic()
    shutil.copytree(source, target)
    _sync(target)
    return time.monotonic() - start


def converted(source: Path, target: Path, options: list[str], limit: int) -> tuple[float, int]:
    """Seconds of a conversion, start included, and the most memory that its process had, in bytes."""
    command = [sys.executable, "-m", "npu_zoo", "convert", str(source), str(target), *options]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed: {process.stderr.read().decode() if process.stderr else ''}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main() -> int:
    """Run all cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        largest = write_synthetic(folder / "source", int(arguments.gigabytes * 1e9))
        size = sum(path.stat().st_size for path in (folder / "source").iterdir())
        limit = (2 << 30) + 2 * largest
        print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, limit {limit / 2**30:.2f} GiB")
        found: dict[str, Any] = {
            case: run_case(folder, size, limit, options, arguments.rounds) for case, options in CASES.items()
        }
    for case, figures in found.items():
        print(f"{case}: {figures}")
    if arguments.record:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
        content = {"bytes": size, "limit_bytes": limit, "machine": machine, "cases": found}
        arguments.record.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def run_case(folder: Path, size: int, limit: int, options: list[str], rounds: int) -> dict[str, float]:
    """Medians of some rounds of a copy and a conversion, one after the other."""
    ratios, rates, copies, memory = [], [], [], 0
    for _ in range(rounds):
        plain = copied(folder / "source", folder / "copy")
        shutil.rmtree(folder / "copy")
        seconds, peak = converted(folder / "source", folder / "result", options, limit)
        shutil.rmtree(folder / "result")
        ratios.append(plain / seconds)
        rates.append(size / seconds / 1e9)
        copies.append(size / plain / 1e9)
        memory = max(memory, peak)
    return {
        "gb_per_s": round(statistics.median(rates), 2),
        "copy_gb_per_s": round(statistics.median(copies), 2),
        "ratio_to_copy": round(statistics.median(ratios), 2),
        "peak_gib": round(memory / 2**30, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
