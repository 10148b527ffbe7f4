"""Quantization methods of other plugins, and what a request with one is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, PluginError
from npu_zoo.core.specs import KernelSpec, QuantizationSpec
from npu_zoo.dispatch import check, resolve
from npu_zoo.registry import Registry, build_registry, find_candidates
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.quantized import quantize_checkpoint


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_checkpoint(tmp_path_factory.mktemp("source"), tokenizer=False)
    return quantize_checkpoint(source, tmp_path_factory.mktemp("target"), bits=4, group_size=32)[0]


@pytest.fixture
def registry() -> Registry:
    return build_registry(find_candidates(""))


def args(weights: Path, **values: Any) -> EngineArgs:
    return EngineArgs(
        **{
            "model": "deepseek_coder:custom",
            "weights": str(weights),
            "hardware": "cpu",
            "dtype": "bfloat16",
            "allow_experimental": True,
            **values,
        }
    )


def test_the_checkpoints_scheme_is_taken(quantized: Path) -> None:
    config = resolve(args(quantized))
    assert config.quantization == "w4a16"
    assert config.quantization_config is not None
    assert (config.quantization_config.group_size, config.quantization_config.weight_bits) == (32, 4)
    assert config.quantization_method == "npu_zoo.nn.quantization:PackedWeights"
    assert {c.operation: c.kernel for c in config.kernels}["linear_w4a16"] == "cpu_linear_w4a16"


def test_check_answers_for_the_checkpoints_scheme(quantized: Path) -> None:
    verdict = check(args(quantized, allow_experimental=None))
    assert not verdict.supported
    assert [reason.axis for reason in verdict.reasons] == ["quantization"]
    assert "--allow-experimental runs it" in verdict.describe()
    assert check(args(quantized)).supported


def test_a_scheme_that_nobody_registers_is_refused(quantized: Path, registry: Registry) -> None:
    del registry.quantization_methods["w4a16"]
    with pytest.raises(PluginError, match="quantization method w4a16; registered: w8a16, w8a8"):
        resolve(args(quantized), registry)


def test_a_method_for_other_chips_is_refused(quantized: Path, registry: Registry) -> None:
    spec = registry.quantization_methods["w4a16"]
    registry.quantization_methods["w4a16"] = spec.model_copy(update={"chips": ("ascend910b",)})
    with pytest.raises(HardwareError, match="quantization w4a16 is for ascend910b, not cpu"):
        resolve(args(quantized), registry)


def test_another_plugins_method_and_kernel_are_chosen(quantized: Path, registry: Registry) -> None:
    mine = QuantizationSpec(
        name="w4a16", weight_bits=4, activation_bits=16, chips=("cpu",), method="somewhere.quantization:Mine"
    )
    registry.quantization_methods["w4a16"] = mine
    registry.kernels["mine"] = KernelSpec(
        name="mine", operation="linear_w4a16", chip="cpu", dtypes=("bfloat16",), implementation="a.b:c", priority=20
    )
    config = resolve(args(quantized), registry)
    assert config.quantization_method == "somewhere.quantization:Mine"
    assert {c.operation: c.kernel for c in config.kernels}["linear_w4a16"] == "mine"


def test_kernels_of_a_scheme_that_is_not_run_stand_in_nobodys_way(quantized: Path, registry: Registry) -> None:
    """A scheme with kernels for one chip alone has none on the others."""
    registry.kernels["far"] = KernelSpec(
        name="far", operation="linear_w2a16", chip="ascend910b", dtypes=("bfloat16",), implementation="a.b:c"
    )
    assert "linear_w2a16" not in {c.operation for c in resolve(args(quantized), registry).kernels}


def test_what_is_not_read_is_refused_with_the_reason(quantized: Path, tmp_path: Path) -> None:
    config = json.loads((quantized / "config.json").read_text("utf-8"))
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(Exception, match=r"is quantized, which .* does not load .*weights.symmetric"):
        resolve(args(tmp_path))
