"""Random models with the head counts that a rank has in the matrix's rows, on the simulated device and on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.registry import get_registry
from npu_zoo.testing.checkpoints import write_checkpoint

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
BOUND = {"float16": 0.02, "bfloat16": 0.15}
PROMPTS = [list(range(3, 3 + length)) for length in (40, 7, 1)]
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=0)


def shares() -> list[Any]:
    """(family, heads, key-value heads, dtype) of a rank in every row of this product whose sizes divide; MLA apart."""
    found = set()
    for family in get_registry().families.values():
        for variant in family.variants:
            config = variant.config
            if config is None or config.mla or config.moe or config.head_dim not in (64, 128):
                continue
            for row in family.matrix.of_size(variant.size):
                if PRODUCT not in row.hardware:
                    continue
                for world in row.world_size:
                    heads, kv_heads = config.num_attention_heads // world, config.num_key_value_heads // world
                    if heads * world == config.num_attention_heads and kv_heads * world == config.num_key_value_heads:
                        found |= {(family.name, heads, kv_heads, dtype) for dtype in row.dtype}
    return sorted(found)


def scores(output: Any) -> list[float]:
    return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or [] if entry]


def test_there_are_rows_to_run() -> None:
    assert PRODUCT == "atlas_800t_a2" or len(shares()) > 3


@pytest.mark.parametrize(("family", "heads", "kv_heads", "dtype"), shares())
def test_a_ranks_share_of_the_heads(family: str, heads: int, kv_heads: int, dtype: str, tmp_path: Path) -> None:
    weights = write_checkpoint(
        tmp_path / "weights", tokenizer=False, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        hidden_size=32 * heads, intermediate_size=192, initializer_range=(32 * heads) ** -0.5,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "model": f"{family}:custom", "weights": str(weights), "dtype": dtype, "skip_tokenizer_init": True,
        "max_model_len": 128, "kv_cache_memory": "32MiB", "allow_experimental": True,
    }  # fmt: skip
    reference = LLM(hardware="cpu", **shared)
    llm = LLM(hardware=PRODUCT, strict_kernels=True, **shared)
    expected, found = reference.generate(PROMPTS, PARAMS), llm.generate(PROMPTS, PARAMS)
    for one, other in zip(expected, found, strict=True):
        pairs = list(zip(scores(one), scores(other), strict=True))
        assert max((abs(a - b) for a, b in pairs), default=0.0) < BOUND[dtype]
    llm.shutdown()
    reference.shutdown()
