"""Quantization methods of other plugins, and what a request with one is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, PluginError, UnsupportedError, WeightsError
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.specs import KernelSpec, QuantizationSpec
from npu_zoo.dispatch import check, resolve
from npu_zoo.fitting import plan_request
from npu_zoo.registry import Registry, build_registry, find_candidates
from npu_zoo.request import read_request
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
    assert {c.operation: c.kernel for c in config.kernels}["linear_w4a16"] in (
        "compiled_linear_w4a16",
        "cpu_linear_w4a16",
    )


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
        name="mine", operation="linear_w4a16", chip="cpu", dtypes=("bfloat16",), implementation="a.b:c", priority=30
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


def read_mine(section: Any) -> QuantizationConfig:
    """What a third party reads: another method, whose scheme is not called after its bits."""
    if section.get("version") != 1:
        raise ValueError(f"version {section.get('version')} is not read, 1 is")
    return QuantizationConfig(
        weight_bits=section["bits"], activation_bits=16, scheme="mine", ignore=tuple(section.get("plain", ()))
    )


def read_nothing(section: Any) -> None:
    """A reader that forgets to return."""


MINE: dict[str, Any] = {"quant_method": "mine-rows", "version": 1, "bits": 2}


@pytest.fixture
def with_mine(registry: Registry) -> Registry:
    """A registry with a third party's method, its one kernel, and rows that offer it."""
    registry.quantization_methods["mine"] = QuantizationSpec(
        name="mine", weight_bits=2, activation_bits=16, chips=("any",), method="somewhere.quantization:Mine",
        quant_method="mine-rows", reader=f"{__name__}:read_mine",
    )  # fmt: skip
    registry.kernels["mine"] = KernelSpec(
        name="mine", operation="linear_mine", chip="any", dtypes=("bfloat16",), implementation="a.b:c", priority=0
    )
    family = registry.families["deepseek_coder"]
    offering = tuple(
        row.model_copy(update={"quantization": ("mine",)}) if "w8a16" in row.quantization else row
        for row in family.rows
    )
    registry.families["deepseek_coder"] = family.model_copy(update={"rows": offering})
    return registry


def checkpoint(directory: Path, section: Any) -> Path:
    write_checkpoint(directory, tokenizer=False)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": section}), "utf-8")
    return directory


def test_a_third_partys_layout_is_read_and_run_by_its_own_name(with_mine: Registry, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, MINE | {"plain": ["lm_head"]})
    config = resolve(args(directory), with_mine)
    assert (config.quantization, config.quantization_method) == ("mine", "somewhere.quantization:Mine")
    assert config.quantization_config is not None
    assert config.quantization_config.ignores("lm_head")
    operations = {choice.operation for choice in config.kernels}
    assert "linear_mine" in operations
    assert "experts_mine" not in operations  # a model without experts takes none
    assert not check(args(directory, quantization="w8a16"), with_mine).supported


def test_a_third_partys_weights_are_planned_by_its_bits(with_mine: Registry, tmp_path: Path) -> None:
    asked = args(checkpoint(tmp_path, MINE))
    request = read_request(asked, with_mine)
    assert request.weight_bits == 2
    assert request.config is not None
    quantized, plain = (
        plan_request(asked, one, request.config, one.split).weights
        for one in (request, read_request(asked.model_copy(update={"quantization": "none"}), with_mine))
    )
    assert quantized < plain
    before = asked.model_copy(update={"weights": None, "model": "deepseek_coder:6.7b", "quantization": "w4a16"})
    assert read_request(before, with_mine).weight_bits == 4


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (MINE | {"version": 2}, r"quant_method mine-rows: version 2 is not read, 1 is\); use an unquantized"),
        (MINE | {"bits": 0}, "quant_method mine-rows: weight_bits: input should be greater than 0"),
        (MINE | {"quant_method": "mine-columns"}, r"\(quant_method mine-columns\); use an unquantized"),
        ({"bits": 2}, "does not load; use an unquantized"),
        ([MINE], "does not load; use an unquantized"),
    ],
)
def test_what_a_third_party_does_not_read_is_refused(
    with_mine: Registry, section: Any, named: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=named):
        resolve(args(checkpoint(tmp_path, section)), with_mine)


@pytest.mark.parametrize(
    ("reader", "section", "named"),
    [
        (
            "read_mine",
            {"quant_method": "mine-rows", "version": 1},
            "read_mine raised KeyError on a quantization_config",
        ),
        ("read_nothing", MINE, "read_nothing gave NoneType where a QuantizationConfig is due"),
        ("read_another", MINE, "has no attribute 'read_another'"),
    ],
)
def test_a_broken_reader_is_named(with_mine: Registry, reader: str, section: Any, named: str, tmp_path: Path) -> None:
    mine = with_mine.quantization_methods["mine"]
    broken = mine.model_copy(update={"reader": f"{__name__}:{reader}"})
    with_mine.quantization_methods["mine"] = broken
    with pytest.raises(PluginError, match=named):
        resolve(args(checkpoint(tmp_path, section)), with_mine)


def test_the_matrix_is_asked_for_a_third_partys_scheme(with_mine: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quantization=mine is not supported"):
        resolve(args(checkpoint(tmp_path, MINE), allow_experimental=None), with_mine)


def test_ranks_may_share_anything_that_is_not_packed(with_mine: Registry, tmp_path: Path) -> None:
    """80 columns on two ranks are 40 codes each: no whole words of 16, and none are due."""
    directory = write_checkpoint(tmp_path, tokenizer=False, intermediate_size=80)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": MINE}), "utf-8")
    assert resolve(args(directory, tensor_parallel_size=2), with_mine).world_size == 2


OWN = KernelSpec(
    name="reference_own", operation="own", chip="any", dtypes=("bfloat16",), implementation="a.b:c", priority=0
)


def test_a_familys_operation_is_nobody_elses(quantized: Path, registry: Registry) -> None:
    """Otherwise another plugin's reference would be a fallback of every run, which strict kernels refuse."""
    registry.kernels["reference_own"] = OWN
    assert "own" not in {choice.operation for choice in resolve(args(quantized), registry).kernels}
    family = registry.families["deepseek_coder"]
    registry.families["deepseek_coder"] = family.model_copy(update={"operations": ("own",)})
    chosen = {choice.operation: choice for choice in resolve(args(quantized), registry).kernels}
    assert chosen["own"].fallback
    with pytest.raises(HardwareError, match="would fall back to the reference: own"):
        resolve(args(quantized, strict_kernels=True), registry)


def test_a_familys_operation_without_kernels_is_refused(quantized: Path, registry: Registry) -> None:
    family = registry.families["deepseek_coder"]
    registry.families["deepseek_coder"] = family.model_copy(update={"operations": ("own",)})
    with pytest.raises(PluginError, match="no plugin registers a kernel for own, which the model calls"):
        resolve(args(quantized), registry)
    far = OWN.model_copy(update={"chip": "ascend910b"})
    registry.kernels["reference_own"] = far
    with pytest.raises(PluginError, match="no kernel for own on cpu with bfloat16: reference_own: for ascend910b"):
        resolve(args(quantized), registry)


def test_a_schemes_experts_need_no_kernel_where_a_model_has_none(with_mine: Registry, tmp_path: Path) -> None:
    with_mine.kernels["far"] = OWN.model_copy(update={"name": "far", "operation": "experts_mine", "chip": "cuda"})
    config = resolve(args(checkpoint(tmp_path, MINE)), with_mine)
    assert "experts_mine" not in {choice.operation for choice in config.kernels}
