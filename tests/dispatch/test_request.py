"""What a request leaves open, and how it is filled in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError, UnknownModelError, UsageError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import check, parse_dtype, resolve
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, read_request

FAMILY = get_registry().families["deepseek_coder"]
PUBLISHED = [variant for variant in FAMILY.variants if variant.config]
Weights = Callable[..., Path]


def fill_in(model: str = "deepseek_coder", hardware: str = "cpu", **asked: Any) -> Request:
    return read_request(EngineArgs(model=model, hardware=hardware, **asked), get_registry())


@pytest.mark.parametrize("variant", PUBLISHED, ids=lambda variant: variant.name)
def test_a_published_checkpoint_is_recognised(variant: Any, as_published: Callable[[ModelConfig], Path]) -> None:
    directory = as_published(variant.config)
    assert fill_in(weights=str(directory)).variant.name == variant.name


def test_end_of_text_ids_of_both_files_tell_the_variant(as_published: Callable[[ModelConfig], Path]) -> None:
    base, instruct = (FAMILY.variant(name) for name in ("1.3b-base", "1.3b-instruct"))
    assert base is not None
    assert instruct is not None
    assert base.config is not None
    directory = as_published(base.config)
    (directory / "generation_config.json").write_text('{"eos_token_id": [32014, 32021]}')
    request = read_request(EngineArgs(model="deepseek_coder", weights=str(directory)), get_registry())
    config = request.config
    assert request.variant.name == "custom"
    assert config is not None
    assert config.eos_token_id == (32014, 32021)


def test_any_other_checkpoint_is_custom(weights: Weights) -> None:
    assert fill_in(weights=str(weights())).model == "deepseek_coder:custom"


def test_without_weights_the_default_variant_is_meant() -> None:
    assert fill_in().model == "deepseek_coder:demo"
    assert fill_in("deepseek_coder:33b").model == "deepseek_coder:33b-instruct"


def test_damaged_end_of_text_ids(weights: Weights) -> None:
    with pytest.raises(WeightsError, match="eos_token_id 'two'; ids are whole numbers"):
        fill_in(weights=str(weights({"eos_token_id": "two"})))


@pytest.mark.parametrize(
    ("model", "hardware", "asked", "due"),
    [
        ("deepseek_coder:33b", "atlas_800i_a2", {}, (4, 1, 1)),
        ("deepseek_coder:33b", "atlas_800i_a2", {"world_size": 8}, (8, 1, 1)),
        ("deepseek_coder:33b", "atlas_800i_a2", {"tensor_parallel_size": 2}, (2, 1, 1)),
        ("deepseek_coder:6.7b", "atlas_300i_duo", {}, (2, 1, 1)),
        ("deepseek_v3:671b", "atlas_800i_a2", {}, (32, 1, 32)),
        ("deepseek_v3:671b", "atlas_800i_a2", {"quantization": "w4a16"}, (8, 1, 8)),
        ("deepseek_v3:671b", "atlas_800i_a2", {"world_size": 16}, (16, 1, 16)),
        ("deepseek_v3:671b", "atlas_800i_a2", {"world_size": 4}, (4, 1, 1)),
        ("deepseek_v3:671b", "atlas_800i_a2", {"tensor_parallel_size": 32}, (32, 1, 1)),
        ("deepseek_v3:v2-236b", "atlas_800i_a2", {}, (16, 1, 16)),
        ("deepseek_moe:16b", "atlas_800t_a2", {"world_size": 16}, (16, 1, 1)),
        ("deepseek_coder", "cpu", {}, (1, 1, 1)),
        ("deepseek_coder", "cpu", {"pipeline_parallel_size": 2}, (1, 2, 1)),
        ("deepseek_coder", "cpu", {"pipeline_parallel_size": 2, "world_size": 8}, (4, 2, 1)),
        ("deepseek_coder", "cpu", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, (4, 2, 1)),
        ("deepseek_coder", "cpu", {"expert_parallel_size": 4}, (4, 1, 4)),
        ("deepseek_coder", "cpu", {"expert_parallel_size": 2, "world_size": 8}, (8, 1, 2)),
        ("deepseek_moe", "cpu", {"expert_parallel_size": 2, "pipeline_parallel_size": 2}, (2, 2, 2)),
        ("deepseek_moe", "cpu", {"data_parallel_size": 2}, (1, 1, 1, 2)),
        ("deepseek_moe", "cpu", {"data_parallel_size": 2, "tensor_parallel_size": 2}, (2, 1, 1, 2)),
        ("deepseek_moe", "cpu", {"data_parallel_size": 2, "world_size": 8}, (4, 1, 1, 2)),
        ("deepseek_moe", "cpu", {"data_parallel_size": 2, "expert_parallel_size": 4}, (2, 1, 4, 2)),
        ("deepseek_moe", "cpu", {"data_parallel_size": 4, "expert_parallel_size": 2}, (1, 1, 2, 4)),
        (
            "deepseek_moe",
            "cpu",
            {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4},
            (2, 1, 4, 2),
        ),
        (
            "deepseek_moe",
            "cpu",
            {"data_parallel_size": 2, "pipeline_parallel_size": 2, "world_size": 8, "expert_parallel_size": 4},
            (2, 2, 4, 2),
        ),
    ],
)
def test_parallel_sizes(model: str, hardware: str, asked: dict[str, Any], due: tuple[int, ...]) -> None:
    request = fill_in(model, hardware, **asked)
    assert request.split == Split(*due)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pipeline_parallel_size": 2, "world_size": 3}, r"world size 3 is not tp \? x pp 2"),
        ({"tensor_parallel_size": 2, "world_size": 8}, "world size 8 is not tp 2 x pp 1"),
        (
            {"expert_parallel_size": 3, "world_size": 4},
            r"the 4 ranks of a stage \(tp 4 x dp 1\) do not divide into .* groups of 3; sizes that do: 1, 2, 4$",
        ),
        (
            {"expert_parallel_size": 8, "tensor_parallel_size": 2, "data_parallel_size": 3},
            r"the 6 ranks of a stage \(tp 2 x dp 3\) do not divide into .* groups of 8; sizes that do: 1, 2, 3, 6$",
        ),
        (
            {"data_parallel_size": 3, "world_size": 4},
            r"world size 4 is not tp \? x pp 1 x dp 3; give --world-size alone, or --tp, --pp and --dp that multiply",
        ),
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 2, "world_size": 2},
            "world size 2 is not tp 2 x pp 1 x dp 2",
        ),
    ],
)
def test_parallel_sizes_that_do_not_multiply(asked: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fill_in(**asked)


@pytest.mark.parametrize(
    ("model", "hardware", "dtype"),
    [
        ("deepseek_coder:6.7b", "atlas_800i_a2", "bfloat16"),
        ("deepseek_coder:6.7b", "atlas_300i_duo", "float16"),
        ("deepseek_coder:33b", "atlas_800t_a2", "float16"),
        ("deepseek_coder:1.3b", "cpu", "bfloat16"),
    ],
)
def test_an_unset_dtype_is_the_variants_where_the_hardware_has_it(model: str, hardware: str, dtype: str) -> None:
    assert fill_in(model, hardware).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_unset_dtype_is_the_checkpoints(weights: Weights, dtype: str) -> None:
    assert fill_in(weights=str(weights(torch_dtype=dtype))).dtype == dtype


@pytest.mark.parametrize(("length", "too_long"), [(None, False), (512, False), (513, True)])
def test_a_sequence_is_long_beyond_the_checkpoints_positions(
    weights: Weights, length: int | None, too_long: bool
) -> None:
    assert fill_in(weights=str(weights()), max_model_len=length).long_sequence is too_long


def test_the_rest_that_is_unset() -> None:
    request = fill_in()
    assert (request.attention, request.quantization, request.kv_cache_dtype) == ("paged", "none", "auto")
    assert request.serving == "offline"
    assert request.axes["parallelism"] == ("tp1", "tp")


def test_unset_hardware_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(model="deepseek_coder")
    monkeypatch.setattr("npu_zoo.request.detect_products", lambda: ("cuda",))
    assert read_request(args, get_registry()).hardware == "cuda"

    def unknown() -> tuple[str, ...]:
        raise HardwareError("SoC")

    monkeypatch.setattr("npu_zoo.request.detect_products", unknown)
    with pytest.raises(HardwareError, match="SoC"):
        read_request(args, get_registry())


def test_of_two_products_that_the_matrix_tells_apart_one_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.request.detect_products", lambda: ("atlas_800i_a2", "atlas_800t_a2"))
    alike = EngineArgs(model="deepseek_coder:demo")
    assert read_request(alike, get_registry()).hardware == "atlas_800i_a2"
    with pytest.raises(HardwareError, match=r"different rows of deepseek_coder:33b.*--hardware atlas_800i_a2\|"):
        read_request(EngineArgs(model="deepseek_coder:33b"), get_registry())


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ({"model": ""}, UsageError, "no model was named; use --model .* Families: deepseek_coder"),
        ({"model": "deepseek"}, UnknownModelError, "deepseek_coder"),
        ({"hardware": "tpu"}, UsageError, "unknown hardware 'tpu'; known: atlas_800i_a2"),
        ({"dtype": "fp8"}, UsageError, r"unknown dtype 'fp8'; known: float32, bfloat16, float16 \("),
        ({"weights": "/nowhere"}, WeightsError, "has no config.json"),
    ],
)
def test_malformed_requests(asked: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fill_in(**asked)


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("float32", "float32"),
        ("Float16", "float16"),
    ],
)  # fmt: skip
def test_spellings_of_dtypes(spelling: str, dtype: str) -> None:
    assert parse_dtype(spelling) == dtype


def test_the_zoos_own_server_runs_what_runs_offline() -> None:
    for serving in ("offline", "openai"):
        assert check(EngineArgs(model="deepseek_coder", hardware="cpu", serving=serving)).supported
    refused = check(EngineArgs(model="deepseek_coder:6.7b", hardware="atlas_800i_a2", world_size=4, serving="tgi"))
    assert [reason.axis for reason in refused.reasons] == ["serving"]
    assert resolve(EngineArgs(model="deepseek_coder", hardware="cpu", serving="openai")).serving == "openai"
