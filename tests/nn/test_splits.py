"""Layers that ranks share, each rank a thread of this process: their sums are the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.step import StepRow
from npu_zoo.parallel.groups import Joined
from npu_zoo.registry import get_registry
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.ranks import run_ranks
from npu_zoo.testing.shapes import shareable_shape, write_random_model
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, plan_conversion
from npu_zoo.weights.quantize import Scheme

ROWS = [
    StepRow(tuple(range(5, 45)), 0, (0, 1, 2), num_logits=1, wants_prompt=True),
    StepRow((7, 8, 9), 0, (3,), num_logits=1, wants_prompt=False),
]
NEXT = [
    StepRow((11,), 40, (0, 1, 2), num_logits=1, wants_prompt=False),
    StepRow((12,), 3, (3,), num_logits=1, wants_prompt=False),
]


def shape_of(family: str, **changes: Any) -> ModelConfig:
    return shareable_shape(get_registry().families[family], **{"vocab_size": 300, **changes})


def config_of(weights: Path, family: str, split: Split, **changes: Any) -> EngineConfig:
    asked = EngineArgs(
        model=f"{family}:custom", weights=str(weights), hardware="cpu", dtype="float32", max_model_len=64,
        kv_cache_memory="8MiB", skip_tokenizer_init=True, allow_experimental=True, block_size=None,
        kv_cache_dtype=changes.pop("kv_cache_dtype", None),
    )  # fmt: skip
    sizes = {
        "tensor_parallel_size": split.tp, "pipeline_parallel_size": split.pp, "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp, "world_size": split.world_size,
    }  # fmt: skip
    return unchecked_config(resolve(asked), **sizes, **changes)


def run(weights: Path, family: str, split: Split | int, **changes: Any) -> list[Tensor]:
    """Both steps' logits, and hidden states of the first."""
    split = Split(split) if isinstance(split, int) else split
    config = config_of(weights, family, split, **changes)

    def rank(joined: Joined) -> list[Tensor]:
        runner = ModelRunner(config, ranks=joined.ranks)
        rows = [replace(row, replica=number % split.dp) for number, row in enumerate(ROWS)]
        first, hidden = runner.execute(rows)
        second, _ = runner.execute([replace(row, replica=n % split.dp) for n, row in enumerate(NEXT)])
        return [first, *hidden, second]

    return run_ranks(split, rank)[0]


def alike(one: list[Tensor], other: list[Tensor], bound: float = 1e-4) -> bool:
    return all((a - b).abs().max() < bound for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", ["deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"])
def test_ranks_together_are_the_whole_model(family: str, size: int, tmp_path: Path) -> None:
    write_random_model(tmp_path / "weights", get_registry().families[family], shape_of(family))
    whole = run(tmp_path / "weights", family, 1)
    assert alike(run(tmp_path / "weights", family, size), whole)


@pytest.mark.long  # `npu-zoo validate` runs every split of each family
@pytest.mark.parametrize("split", [Split(pp=3), Split(2, pp=2)], ids=Split.describe)
@pytest.mark.parametrize("family", ["deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"])
def test_stages_together_are_the_whole_model(family: str, split: Split, tmp_path: Path) -> None:
    config = shape_of(family, num_hidden_layers=3)
    write_random_model(tmp_path / "weights", get_registry().families[family], config)
    assert alike(run(tmp_path / "weights", family, split), run(tmp_path / "weights", family, 1))


WHOLE_EXPERTS = [
    Split(2, ep=2), Split(4, ep=4), Split(4, ep=2), Split(1, dp=2, ep=2), Split(2, dp=2, ep=4), Split(2, dp=2, ep=2),
    Split(1, dp=4, ep=4), Split(2, pp=2, ep=2), Split(1, dp=2, pp=2, ep=2),
]  # fmt: skip


@pytest.mark.long  # `npu-zoo validate` runs every split of each family
@pytest.mark.parametrize(
    ("family", "split", "dispatch"),
    [("deepseek_v3", split, "all_to_all") for split in WHOLE_EXPERTS]
    + [("deepseek_v3", split, "all_gather") for split in (WHOLE_EXPERTS[2], WHOLE_EXPERTS[4], WHOLE_EXPERTS[5])]
    + [("deepseek_moe", split, "all_gather") for split in (WHOLE_EXPERTS[1], WHOLE_EXPERTS[3], WHOLE_EXPERTS[7])],
)
def test_ranks_with_whole_experts(family: str, split: Split, dispatch: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "weights", get_registry().families[family], shape_of(family))
    whole = run(tmp_path / "weights", family, 1)
    assert alike(run(tmp_path / "weights", family, split, expert_dispatch=dispatch), whole)


@pytest.mark.long  # `npu-zoo validate` runs every split of each family
@pytest.mark.parametrize("family", ["deepseek_coder", "deepseek_moe"])
@pytest.mark.parametrize("split", [Split(dp=2), Split(2, dp=2), Split(dp=2, pp=2)], ids=Split.describe)
def test_replicas_of_the_attention(family: str, split: Split, tmp_path: Path) -> None:
    write_random_model(tmp_path / "weights", get_registry().families[family], shape_of(family))
    assert alike(run(tmp_path / "weights", family, split), run(tmp_path / "weights", family, 1))


@pytest.mark.parametrize("stored", [True, False], ids=["with its copy", "alone"])
def test_a_tied_head_on_a_stage_of_its_own(stored: bool, tmp_path: Path) -> None:
    config = shape_of("deepseek_coder", tie_word_embeddings=True)
    directory = write_random_model(tmp_path / "weights", get_registry().families["deepseek_coder"], config)
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if stored else {}
    save_file(tensors | copy, directory / "model.safetensors")
    assert alike(run(directory, "deepseek_coder", Split(pp=2)), run(directory, "deepseek_coder", 1))


@pytest.mark.parametrize("family", ["deepseek_coder", "deepseek_v3"])
def test_ranks_of_one_head(family: str, tmp_path: Path) -> None:
    config = shape_of(family, num_attention_heads=2, num_key_value_heads=2)
    write_random_model(tmp_path / "weights", get_registry().families[family], config)
    whole = run(tmp_path / "weights", family, 1)
    assert alike(run(tmp_path / "weights", family, 2), whole)


def test_key_value_heads_are_copied_where_there_are_fewer_than_ranks(tmp_path: Path) -> None:
    config = shape_of("deepseek_coder", num_key_value_heads=2)
    write_random_model(tmp_path / "weights", get_registry().families["deepseek_coder"], config)
    whole = run(tmp_path / "weights", "deepseek_coder", 1)
    assert alike(run(tmp_path / "weights", "deepseek_coder", 4), whole)


@pytest.mark.long  # `npu-zoo validate` runs every split of each family
@pytest.mark.parametrize(
    ("family", "scheme", "bound"),
    [
        ("deepseek_coder", "w8a16", 1e-3),
        ("deepseek_coder", "w4a16", 1e-3),
        ("deepseek_coder", "w8a8", 0.2),  # a rank's tokens have scales of their own columns
        ("deepseek_moe", "w8a16", 1e-3),
        ("deepseek_v3", "w8a16", 1e-3),
        ("deepseek_v3", "w4a16", 1e-3),
    ],
)
def test_quantized_ranks(family: str, scheme: str, bound: float, tmp_path: Path) -> None:
    write_random_model(tmp_path / "plain", get_registry().families[family], shape_of(family))
    options = ConvertOptions("hf-safetensors", scheme=Scheme.of(scheme))
    convert(plan_conversion(tmp_path / "plain", options), tmp_path / "weights")
    whole = run(tmp_path / "weights", family, 1)
    assert alike(run(tmp_path / "weights", family, 2), whole, bound)


@pytest.mark.long  # `npu-zoo validate` runs every split of each family
@pytest.mark.parametrize(
    ("family", "scheme", "split"),
    [
        ("deepseek_coder", "w4a16", Split(2, pp=2)),
        ("deepseek_moe", "w8a16", Split(2, dp=2, ep=4)),
        ("deepseek_v3", "w8a16", Split(2, pp=2, ep=2)),
    ],
)
def test_quantized_stages_and_experts(family: str, scheme: str, split: Split, tmp_path: Path) -> None:
    write_random_model(tmp_path / "plain", get_registry().families[family], shape_of(family))
    options = ConvertOptions("hf-safetensors", scheme=Scheme.of(scheme))
    convert(plan_conversion(tmp_path / "plain", options), tmp_path / "weights")
    assert alike(run(tmp_path / "weights", family, split), run(tmp_path / "weights", family, 1), 1e-3)


def test_int8_caches_of_ranks(tmp_path: Path) -> None:
    config = shape_of("deepseek_coder", head_dim=32)
    write_random_model(tmp_path / "weights", get_registry().families["deepseek_coder"], config)
    whole = run(tmp_path / "weights", "deepseek_coder", 1, kv_cache_dtype="int8")
    assert alike(run(tmp_path / "weights", "deepseek_coder", Split(2, pp=2), kv_cache_dtype="int8"), whole, 0.05)


@pytest.mark.parametrize("split", [Split(2, ep=2), Split(pp=2)], ids=Split.describe)
def test_stages_and_experts_out_of_files_of_four_ranks(split: Split, tmp_path: Path) -> None:
    write_random_model(tmp_path / "plain", get_registry().families["deepseek_v3"], shape_of("deepseek_v3"))
    convert(plan_conversion(tmp_path / "plain", ConvertOptions("ascend-mp", tp=4)), tmp_path / "weights")
    assert alike(run(tmp_path / "weights", "deepseek_v3", split), run(tmp_path / "plain", "deepseek_v3", 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_files_of_another_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    write_random_model(tmp_path / "plain", get_registry().families["deepseek_v3"], shape_of("deepseek_v3"))
    convert(plan_conversion(tmp_path / "plain", ConvertOptions("ascend-mp", tp=ranks)), tmp_path / "weights")
    whole = run(tmp_path / "plain", "deepseek_v3", 1)
    assert alike(run(tmp_path / "weights", "deepseek_v3", 2), whole)


def test_a_rank_holds_its_share(tmp_path: Path) -> None:
    write_random_model(tmp_path / "weights", get_registry().families["deepseek_coder"], shape_of("deepseek_coder"))

    def measure(size: int) -> int:
        config = config_of(tmp_path / "weights", "deepseek_coder", Split(size))
        reports = run_ranks(Split(size), lambda joined: ModelRunner(config, ranks=joined.ranks).own_report())
        return int(reports[0]["parameter_bytes"])

    sizes = {size: measure(size) for size in (1, 2, 4)}
    norms = 5 * 256 * 4
    padding = 20 * 256 * 4 * 2  # rows beyond the vocabulary of 300, which the first ranks have none of
    assert (sizes[2] - norms) * 2 == sizes[1] - norms + padding
    assert (sizes[4] - norms) * 4 == sizes[1] - norms + padding


def test_ranks_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path / "weights", get_registry().families["deepseek_coder"], shape_of("deepseek_coder"))
    with pytest.raises(WeightsError, match="cannot be shared by 3 ranks"):
        run(tmp_path / "weights", "deepseek_coder", 3)
