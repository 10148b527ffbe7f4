"""Checkpoints of every format are loaded as they are, ranks' files by an engine of another number of ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.checkpoint import detect_format
from npu_zoo.core.weights import Shard
from npu_zoo.registry import get_registry, load_code
from npu_zoo.request import bundled_directory
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.safetensors import SafetensorsLoader

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def texts(family: str, weights: Path) -> list[Any]:
    model = f"{family}:custom"
    with LLM(model=model, weights=str(weights), hardware="cpu", dtype="float32", max_model_len=128) as llm:
        outputs = llm.generate(["def add(a, b):\n", "import os\n"], GREEDY)
    return [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]


@pytest.mark.parametrize(
    ("family", "to", "ranks"),
    [
        ("deepseek_coder", "hf-bin", 1),
        ("deepseek_coder", "mindspore-ckpt", 1),
        ("deepseek_coder", "mindspore-ckpt", 2),
        ("wizardcoder", "ascend-mp", 1),
        ("deepseek_moe", "ascend-mp", 2),
        ("deepseek_v3", "ascend-mp", 2),
        ("deepseek_v3", "hf-bin", 1),
    ],
)
def test_every_format_gives_the_same_text(family: str, to: str, ranks: int, tmp_path: Path) -> None:
    variant = get_registry().families[family].variant("demo")
    assert variant is not None
    source = bundled_directory(variant)
    assert source is not None
    mtp: Literal["keep", "drop"] = "drop" if to == "ascend-mp" else "keep"
    convert(plan_conversion(source, ConvertOptions(to, tp=ranks, mtp=mtp)), tmp_path / "there")
    assert texts(family, tmp_path / "there") == texts(family, source)


@pytest.mark.parametrize(("to", "ranks"), [("ascend-mp", 4), ("ascend-mp", 2), ("hf-bin", 1)])
def test_parts_of_every_format(to: str, ranks: int, tmp_path: Path) -> None:
    variant = get_registry().families["deepseek_moe"].variant("demo")
    assert variant is not None
    source = bundled_directory(variant)
    assert source is not None
    whole = {name: tensor.clone() for name, tensor in SafetensorsLoader(source).tensors()}
    convert(plan_conversion(source, ConvertOptions(to, tp=ranks)), tmp_path / "there")
    spec = detect_format(tmp_path / "there", get_registry().weight_formats)
    loader = load_code(spec.loader or "")(tmp_path / "there")
    rows, columns = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    size = {name: whole[name].shape for name in (rows, columns)}
    shards = {
        rows: Shard(0, size[rows][0] // 4, size[rows][0] // 2, size[rows][0]),
        columns: Shard(1, size[columns][1] // 2, size[columns][1], size[columns][1]),
    }
    found = dict(loader.tensors(shards))
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], shards[name].of(tensor) if name in shards else tensor)
