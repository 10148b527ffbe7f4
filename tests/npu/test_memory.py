"""The KV cache of a device is sized from what weights and a measured step leave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from npu_zoo import LLM
from npu_zoo.core.parallel import Split
from npu_zoo.planning import Workload, plan_rank

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
FAMILIES = ["deepseek_coder", "wizardcoder"] + ([] if DUO else ["deepseek_moe", "deepseek_v3"])
MIB = 1 << 20


def explained(llm: LLM) -> dict[str, Any]:
    return llm.engine.explain()


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_near_what_is_measured(family: str) -> None:
    llm = LLM(model=f"{family}:demo", hardware=PRODUCT, dtype="float16")
    config, found = llm.engine.config, explained(llm)
    workload = Workload(config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens)
    plan = plan_rank(config.model_config, "float16", Split(), workload)
    assert 0.7 < plan.activations / found["activation_bytes"] < 1.3
    assert plan.cache_per_token * found["kv_cache_tokens"] == found["kv_cache_bytes"]
    llm.shutdown()


def on_a_device_of(memory: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, on a device of some bytes; it has LLM, SamplingParams, PRODUCT and MIB."""
    names = f"from npu_zoo import LLM, SamplingParams\nPRODUCT, MIB = {PRODUCT!r}, 1 << 20\n"
    environ = {"NPU_ZOO_SIMULATE": PRODUCT, "NPU_ZOO_SIMULATE_MEMORY_GIB": str(memory / 2**30)}
    return subprocess.run(
        [sys.executable, "-c", names + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environ},
    )


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_full_device_holds_the_largest_batch(attention: str) -> None:
    done = on_a_device_of(
        140 * MIB,
        f"""
        llm = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", attention="{attention}",
                  max_model_len=512, max_num_seqs=128)
        found = llm.engine.explain()
        assert 16 * MIB < found["kv_cache_bytes"] < 128 * MIB, found  # below what 128 sequences of 512 could fill
        params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, max_tokens=5, ignore_eos=True, logprobs=1)
        outputs = llm.generate([[3 + number % 50] * (20 + number) for number in range(128)], params)
        print([len(output.outputs[0].token_ids) for output in outputs] == [5] * 128)
        """,
    )
    assert done.stdout.endswith("True\n"), done.stderr[-3000:]


def test_what_is_left_decides_the_size_of_the_cache() -> None:
    done = on_a_device_of(
        160 * MIB,
        """
        found = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16").engine.explain()
        assert 2048 < found["kv_cache_tokens"] < 64 * 2048
        print(found["parameter_bytes"] + found["reserved_bytes"] + found["kv_cache_bytes"])
        """,
    )
    assert 100 * MIB < int(done.stdout.split()[-1]) <= 160 * MIB, done.stderr[-3000:]


def test_a_device_without_room_is_refused_before_loading() -> None:
    done = on_a_device_of(4 * MIB, "LLM(model='deepseek_coder:demo', hardware=PRODUCT, dtype='float16')")
    assert "HardwareError" in done.stderr
    assert "npu-zoo plan --model deepseek_coder:demo" in done.stderr


def test_a_given_size_is_not_measured_for() -> None:
    llm = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", kv_cache_memory="8MiB")
    assert explained(llm)["activation_bytes"] is None
    assert explained(llm)["kv_cache_bytes"] <= 8 * MIB
    llm.shutdown()
