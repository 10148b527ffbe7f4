"""What `npu-zoo convert --quantize` wrote, run by the engine: as the plain checkpoint of what its codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from npu_zoo import LLM
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory
from npu_zoo.testing.agreement import agree
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, open_source, plan_conversion
from npu_zoo.weights.quantize import Scheme, dequantize_rows
from npu_zoo.weights.reading import Reader

PROMPTS = [list(range(5, 45)), [7, 8, 9]]


def demo(family: str) -> Path:
    variant = get_registry().families[family].variant("demo")
    directory = bundled_directory(variant) if variant else None
    assert directory is not None
    return directory


def restored(quantized: Path, plain: Path, target: Path) -> Path:
    """The plain checkpoint of what a quantized one stands for."""
    convert(plan_conversion(plain, ConvertOptions("hf-safetensors", dtype="float32")), target)
    _, source, _ = open_source(quantized)
    tensors = {}
    with Reader() as reader:
        for name, tensor in source.tensors.items():
            rows = source.read(name, 0, tensor.num_rows, reader)
            tensors[name] = rows.values if rows.scales is None else dequantize_rows(rows.values, rows.scales)
    safetensors.torch.save_file({n: t.float() for n, t in tensors.items()}, target / "model.safetensors")
    return target


SCHEMES = [Scheme.of("w8a16"), Scheme.of("w4a16"), Scheme.of("w4a16", 16)]


def case(family: str, scheme: Scheme) -> Any:
    often = family == "deepseek_coder" or scheme is SCHEMES[-1]
    return pytest.param(family, scheme, id=f"{family}-{scheme}", marks=[] if often else pytest.mark.long)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [case(family, scheme) for family in ("deepseek_coder", "deepseek_moe", "deepseek_v3") for scheme in SCHEMES],
)
def test_quantized_runs_as_what_it_stands_for(family: str, scheme: Scheme, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    convert(plan_conversion(demo(family), ConvertOptions("hf-safetensors", scheme=scheme)), quantized)
    shared: dict[str, Any] = {"model": f"{family}:custom", "hardware": "cpu", "dtype": "float32", "max_model_len": 128}
    with (
        LLM(weights=str(restored(quantized, demo(family), tmp_path / "plain")), **shared) as plain,
        LLM(weights=str(quantized), allow_experimental=True, **shared) as llm,
    ):
        assert llm.engine.config.quantization == scheme.name  # type: ignore[attr-defined]
        assert agree(plain, llm, PROMPTS).within(1e-3)


def test_ranks_files_that_are_quantized_load_as_they_are(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    scheme = Scheme.of("w8a16")
    convert(plan_conversion(demo("deepseek_v3"), ConvertOptions("hf-safetensors", scheme=scheme)), one)
    convert(plan_conversion(demo("deepseek_v3"), ConvertOptions("ascend-mp", scheme=scheme, tp=2, mtp="drop")), two)
    shared: dict[str, Any] = {"model": "deepseek_v3:custom", "hardware": "cpu", "dtype": "float32"}
    shared |= {"max_model_len": 128, "allow_experimental": True}
    with LLM(weights=str(one), **shared) as whole, LLM(weights=str(two), **shared) as ranks:
        assert agree(whole, ranks, PROMPTS).worst_logprob == 0


def test_dynamic_tokens_change_little(tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    plan = plan_conversion(demo("deepseek_coder"), ConvertOptions("hf-safetensors", scheme=Scheme.of("w8a8")))
    convert(plan, quantized)
    shared: dict[str, Any] = {"model": "deepseek_coder:custom", "hardware": "cpu", "dtype": "float32"}
    with (
        LLM(weights=str(demo("deepseek_coder")), max_model_len=128, **shared) as plain,
        LLM(weights=str(quantized), max_model_len=128, allow_experimental=True, **shared) as llm,
    ):
        found = agree(plain, llm, PROMPTS)
    assert 0 < found.worst_logprob < 0.5
    assert not torch.isnan(torch.tensor(found.worst_logprob))
