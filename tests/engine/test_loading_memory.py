"""Loading a model holds its weights once, also where a kernel lays them out anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROBE = """
import pathlib, re, sys
from npu_zoo import LLM

def peak():  # of this process alone: ru_maxrss counts the parent's, up to the exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def load(weights):
    options = dict(dtype="bfloat16", skip_tokenizer_init=True, kv_cache_memory="4MiB", max_model_len=32)
    return LLM("deepseek_coder:custom", weights, **options)

load(sys.argv[1])  # imports and libraries are not the weights'
before = peak()
engine = load(sys.argv[2]).engine
print((peak() - before) / engine.explain()["parameter_bytes"])
"""


def write(directory: Path, layers: int) -> str:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=8, vocab_size=4096
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return str(directory)


@pytest.mark.slow
def test_the_peak_of_loading_is_near_one_copy(tmp_path: Path) -> None:
    small, large = write(tmp_path / "small", 1), write(tmp_path / "large", 10)
    ran = subprocess.run([sys.executable, "-c", PROBE, small, large], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.3
