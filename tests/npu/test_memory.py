"""The KV cache of a device is sized from what weights and a measured step leave."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.errors import HardwareError
from npu_zoo.planning import Split, Workload, plan_rank

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
FAMILIES = ["deepseek_coder", "wizardcoder"] + ([] if DUO else ["deepseek_moe", "deepseek_v3"])
MIB = 1 << 20


@contextlib.contextmanager
def only(free: int) -> Iterator[None]:
    """Take a device's memory but for some bytes; what is simulated costs nothing until it is touched."""
    gc.collect()
    torch.npu.empty_cache()  # type: ignore[attr-defined]
    size = torch.npu.mem_get_info()[0] - free  # type: ignore[attr-defined]
    ballast = torch.empty(size // 512 * 512, dtype=torch.uint8, device="npu")
    try:
        yield
    finally:
        del ballast
        gc.collect()
        torch.npu.empty_cache()  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_a_full_device_holds_the_largest_batch(attention: str) -> None:
    options: dict[str, Any] = {"attention": attention, "max_model_len": 512, "max_num_seqs": 128}
    params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, max_tokens=5, ignore_eos=True, logprobs=1, seed=1)
    prompts = [[3 + number % 50] * (20 + number) for number in range(128)]
    with only(140 * MIB):
        llm = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", **options)
        found = explained(llm)
        assert 16 * MIB < found["kv_cache_bytes"] < 128 * MIB  # below what 128 sequences of 512 could fill
        outputs = llm.generate(prompts, params)
        llm.shutdown()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5] * 128


def test_what_is_left_decides_the_longest_sequence() -> None:
    with only(160 * MIB):
        llm = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16")
        found = explained(llm)
        llm.shutdown()
    assert 2048 < found["kv_cache_tokens"] < 64 * 2048
    assert found["parameter_bytes"] + found["reserved_bytes"] + found["kv_cache_bytes"] <= 160 * MIB


def test_a_device_without_room_is_refused_before_loading() -> None:
    with only(4 * MIB), pytest.raises(HardwareError, match=r"npu-zoo plan --model deepseek_coder:demo"):
        LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16")


def test_a_given_size_is_not_measured_for() -> None:
    llm = LLM(model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", kv_cache_memory="8MiB")
    assert explained(llm)["activation_bytes"] is None
    assert explained(llm)["kv_cache_bytes"] <= 8 * MIB
    llm.shutdown()
