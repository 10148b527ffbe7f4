"""Random models with the head counts that a rank has in the matrix's rows, on the simulated device and on the CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UnsupportedError
from npu_zoo.core.features import splits_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.simulator import RuleBroken
from npu_zoo.testing.agreement import agree
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.shapes import rank_shape, write_random_model

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
BOUND = {"float16": 0.02, "bfloat16": 0.6}
"""Natural-log probability; twice and more what was seen. Rounding to bfloat16 turns the choice between experts that are
nearly equal, on a CPU and on an NPU at other places: each was seen up to 0.27 from float32 in single tokens."""

MEAN_BOUND = {"float16": 0.005, "bfloat16": 0.07}
"""The same on average over all tokens."""

PROMPTS = [list(range(3, 3 + length)) for length in (40, 7, 1)]


def shares() -> list[Any]:
    """A rank's share of every row of this product, once for each family, heads, experts and dtype that differ."""
    found: dict[tuple[Any, ...], Any] = {}
    for family in get_registry().families.values():
        for variant in family.variants:
            for row in family.matrix.of_size(variant.size) if variant.config else ():
                if PRODUCT not in row.hardware or "none" not in row.quantization:
                    continue
                assert variant.config
                for split in {s for w in row.world_size for layout in row.parallelism for s in splits_of(layout, w)}:
                    if variant.config.num_attention_heads % split.tp:
                        continue
                    config = rank_shape(variant.config, split)
                    for dtype in row.dtype:
                        heads = f"{config.num_attention_heads}-{config.num_key_value_heads}x{config.head_dim}"
                        name = f"{family.name}-{heads}-{dtype}"
                        found[name] = pytest.param(family.name, config, dtype, id=name)
    return [found[name] for name in sorted(found)]


def test_there_are_rows_to_run() -> None:
    assert PRODUCT != "atlas_800i_a2" or len(shares()) > 20
    assert shares()


def engines(family: str, weights: Path, dtype: str, **options: Any) -> tuple[LLM, LLM]:
    shared: dict[str, Any] = {
        "model": f"{family}:custom", "weights": str(weights), "dtype": dtype, "skip_tokenizer_init": True,
        "max_model_len": 128, "kv_cache_memory": "32MiB", "allow_experimental": True, **options,
    }  # fmt: skip
    return LLM(hardware="cpu", **shared), LLM(hardware=PRODUCT, strict_kernels=True, **shared)


@pytest.mark.parametrize(("family", "config", "dtype"), shares())
def test_a_ranks_share_of_the_heads(family: str, config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    weights = write_random_model(tmp_path / "weights", get_registry().families[family], config)
    reference, llm = engines(family, weights, dtype)
    found = agree(reference, llm, PROMPTS)
    assert found.within(BOUND[dtype]), found
    assert found.mean_logprob < MEAN_BOUND[dtype], found
    llm.shutdown()
    reference.shutdown()


@pytest.mark.chip("ascend310p")
@pytest.mark.parametrize(
    ("family", "dtype", "broken"),
    [("deepseek_v3", "float16", "on ascend310p"), ("wizardcoder", "bfloat16", "torch.bfloat16 on ascend310p")],
)
def test_what_the_matrix_refuses_the_simulator_refuses_too(family: str, dtype: str, broken: str) -> None:
    asked: dict[str, Any] = {"model": f"{family}:demo", "dtype": dtype, "max_model_len": 64}
    with pytest.raises(UnsupportedError, match=PRODUCT):
        resolve(EngineArgs(hardware=PRODUCT, **asked))
    checked = resolve(EngineArgs(hardware="atlas_800i_a2", **asked))
    config = unchecked_config(checked, hardware=PRODUCT, chip="ascend310p", kv_cache_memory=1 << 20)
    with pytest.raises(RuleBroken, match=re.escape(broken)):
        LLM.from_config(config).generate([[3, 4, 5]])
