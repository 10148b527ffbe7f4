"""Loading a model holds its weights once, also where a kernel lays them out anew."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from npu_zoo.testing.quantized import quantize_checkpoint

PROBE = """
import pathlib, re, sys
from npu_zoo import LLM

def peak():  # of this process alone: ru_maxrss counts the parent's, up to the exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def load(weights):
    options = dict(dtype="bfloat16", skip_tokenizer_init=True, kv_cache_memory="4MiB", max_model_len=32)
    options["allow_experimental"] = True  # quantized weights
    return LLM("deepseek_coder:custom", weights, **options)

load(sys.argv[1])  # imports and libraries are not the weights'
before = peak()
engine = load(sys.argv[2]).engine
print(peak() - before, engine.explain()["parameter_bytes"])
"""


def write(directory: Path, layers: int, vocab_size: int = 4096) -> str:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=8, vocab_size=vocab_size
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    # What the weights are does not matter here.
    weights = {name: torch.full(meta.shape, 0.01, dtype=torch.bfloat16) for name, meta in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def growth(small: str, large: str) -> tuple[int, int]:
    """By how many bytes the peak of memory grows with a larger model, and the bytes of its weights."""
    ran = subprocess.run([sys.executable, "-c", PROBE, small, large], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    grown, stored = map(int, ran.stdout.split())
    return grown, stored


@pytest.mark.slow
def test_the_peak_of_loading_is_near_one_copy(tmp_path: Path) -> None:
    grown, stored = growth(write(tmp_path / "small", 1), write(tmp_path / "large", 10))
    assert grown < 1.3 * stored


@pytest.mark.slow
@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.long), 4])
def test_quantized_weights_are_loaded_without_a_plain_copy(bits: int, tmp_path: Path) -> None:
    """Safetensors puts all codes before the first scale, so they may wait once; a plain copy would be 158 MB more."""
    paths = []
    for name, layers in (("small", 1), ("large", 6)):
        source = Path(write(tmp_path / name, layers, vocab_size=256))
        quantized, plain = quantize_checkpoint(source, tmp_path / f"{name}-{bits}", bits=bits, dtype="bfloat16")
        shutil.rmtree(plain)
        paths.append(str(quantized))
    grown, stored = growth(*paths)
    assert stored < 85e6
    assert grown < 2 * stored + 30e6
