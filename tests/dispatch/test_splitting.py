"""Sizes that a model's shape does not allow: what is refused, and which sizes are named instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, UnsupportedError
from npu_zoo.core.features import FeatureRow, Reason, splits_of
from npu_zoo.core.hardware import CHIPS
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.dispatch import resolve
from npu_zoo.fitting import offered_splits
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, read_request
from npu_zoo.splitting import choose_expert_dispatch, split_faults

Weights = Callable[..., Path]

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **DENSE, "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 12, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1, "num_key_value_heads": 12,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **EXPERTS, "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 32, "q_lora_rank": 48,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24, "num_key_value_heads": 1,
}  # fmt: skip
ROW = FeatureRow(
    sizes=("custom",), hardware=("cpu",), dtype=("bfloat16",), world_size=(1,), attention=("paged",), source="zoo"
)
COPIES = ROW.model_copy(update={"replicated_kv_heads": True})
OF_FAMILY = {DENSE["architectures"][0]: "deepseek_coder", EXPERTS["architectures"][0]: "deepseek_moe"}


def request_of(quantization: QuantizationConfig | None = None, **asked: Any) -> tuple[EngineArgs, Request]:
    args = EngineArgs(model="deepseek_moe:custom", hardware="cpu", **asked)
    request = read_request(args, get_registry())
    return args, Request(**{**vars(request), "asked": "m", "quantization_config": quantization})


def faults(
    raw: dict[str, Any],
    split: Split,
    row: FeatureRow = COPIES,
    quantization: QuantizationConfig | None = None,
    **asked: Any,
) -> list[Reason]:
    args, request = request_of(quantization, **asked)
    return split_faults(args, request, row, ModelConfig.from_hf(raw), split)


def fault(*arguments: Any, **asked: Any) -> tuple[str, int, tuple[int, ...], str]:
    (found,) = faults(*arguments, **asked)
    assert isinstance(found.value, int)
    return found.axis, found.value, tuple(map(int, found.supported)), found.message


TP, PP, EP, DP = (f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "expert", "data"))


@pytest.mark.parametrize(
    ("changes", "tp", "fit", "text"),
    [
        ({"num_key_value_heads": 12}, 7, (1, 2, 4),
         "12 attention heads, 12 key-value heads, 96 values of intermediate_size and 320 rows of the padded vocabulary"
         "; sizes that do: 1, 2, 4"),
        ({"num_key_value_heads": 12}, 3, (1, 2, 4), "does not divide m's 320 rows of the padded vocabulary; sizes"),
        ({"num_key_value_heads": 12, "vocab_size": 192}, 8, (1, 2, 3, 4, 6, 12), "12 attention heads"),
        ({"num_key_value_heads": 6, "vocab_size": 192}, 4, (1, 2, 3, 6, 12), "does not divide m's 6 key-value heads;"),
        ({"num_key_value_heads": 1, "vocab_size": 192}, 8, (1, 2, 3, 4, 6, 12), "12 attention heads; sizes"),
        ({"num_key_value_heads": 12, "vocab_size": 192, "intermediate_size": 98}, 4, (1, 2), "98 values of"),
    ],
)  # fmt: skip
def test_tensor_parallel_sizes_of_a_dense_model(
    changes: dict[str, Any], tp: int, fit: tuple[int, ...], text: str
) -> None:
    axis, value, supported, message = fault({**DENSE, **changes}, Split(tp))
    assert (axis, value, supported) == (TP, tp, fit)
    assert message.startswith(f"{TP}={tp} does not divide m's ")
    assert text in message
    assert not faults({**DENSE, **changes}, Split(fit[-1]))


def test_key_value_heads_are_copied_where_the_row_says_so() -> None:
    raw = {**DENSE, "num_key_value_heads": 2}
    assert faults(raw, Split(4), COPIES) == []
    axis, _, fit, message = fault(raw, Split(4), ROW)
    assert (axis, fit) == (TP, (1, 2))
    assert "m's 2 key-value heads (its row of the matrix offers no copies of them); sizes that do: 1, 2" in message


def test_latent_attention_has_no_key_value_heads_to_share() -> None:
    assert faults(LATENT, Split(4), ROW) == []


def test_the_shared_experts_and_the_dense_layers_of_a_model_with_experts() -> None:
    axis, _, fit, message = fault({**EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 6}, Split(4, ep=4))
    assert (axis, fit) == (TP, (1, 2))
    assert "does not divide m's 6 values of the shared experts' width; sizes that do: 1, 2" in message
    everywhere = {**EXPERTS, "intermediate_size": 97, "first_k_dense_replace": 0}
    assert faults(everywhere, Split(4, ep=4)) == []
    assert fault({**everywhere, "first_k_dense_replace": 1}, Split(4, ep=4))[2] == (1,)


def test_experts_that_do_not_divide() -> None:
    axis, value, fit, message = fault(EXPERTS, Split(4, dp=2, ep=8))
    assert (axis, value, fit) == (EP, 8, (1, 2, 3, 4, 6, 12))
    assert f"{EP}=8 does not divide m's 12 routed experts; sizes that do: 1, 2, 3, 4, 6, 12" in message


def test_ranks_of_an_expert_divide_its_width() -> None:
    raw = {**EXPERTS, "n_shared_experts": 0, "moe_intermediate_size": 6}
    axis, value, fit, message = fault(raw, Split(4, dp=2, ep=2))
    assert (axis, value, fit) == (EP, 2, (4,))
    assert message == (
        f"{EP}=2 leaves 4 ranks to share an expert (tp x dp / ep), which do not divide m's 6 values of "
        "moe_intermediate_size; sizes that do: 4"
    )
    none = fault({**raw, "moe_intermediate_size": 7, "n_routed_experts": 5}, Split(4, dp=2))
    assert none[2] == ()
    assert none[3].endswith("no size of this many ranks does")


def test_experts_of_a_model_without_any() -> None:
    axis, value, fit, message = fault(DENSE, Split(4, ep=2))
    assert (axis, value, fit) == (EP, 2, (1,))
    assert message == f"{EP}=2 shares experts out, and m has none; leave --ep out"


def test_stages_and_replicas_that_would_be_empty() -> None:
    axis, _, fit, message = fault(DENSE, Split(pp=4))
    assert (axis, fit) == (PP, (1, 2, 3))
    assert message == f"{PP}=4 leaves a stage without a layer: m has 3; sizes that do not: 1 to 3"
    axis, _, fit, message = fault(DENSE, Split(dp=3), max_num_seqs=2)
    assert (axis, fit) == (DP, (1, 2))
    assert message == f"{DP}=3 leaves a replica without a sequence: max_num_seqs is 2; sizes that do not: 1 to 2"
    assert faults(DENSE, Split(pp=3, dp=3)) == []


def test_every_size_that_does_not_fit_is_named_at_once() -> None:
    found = faults(EXPERTS, Split(5, 4, 5, 65))
    assert [reason.axis for reason in found] == [TP, EP, EP, PP, DP]


def group_of(size: int | None, bits: int = 4, activations: int = 16, ignore: tuple[str, ...] = ()) -> Any:
    """As compressed-tensors stores it: in words of 32 bits where activations stay as they are."""
    words = 32 // bits if activations == 16 else 1
    return QuantizationConfig(
        weight_bits=bits, activation_bits=activations, group_size=size, ignore=ignore, codes_per_word=words
    )


@pytest.mark.parametrize(
    ("quantization", "tp", "fit", "text"),
    [
        (group_of(32), 2, (1,), "m's 96 columns of mlp.down_proj in groups of 32;"),
        (group_of(32), 4, (1,), "m's 192 columns of self_attn.o_proj in groups of 32 and 96 columns of mlp.down_proj"),
        (group_of(24), 4, (1, 2, 4), ""),
        (group_of(32, ignore=("re:.*down_proj",)), 4, (1, 2), "m's 192 columns of self_attn.o_proj in groups of 32;"),
        (group_of(None), 8, (1, 2, 4), "12 attention heads"),
        (group_of(None, ignore=("re:.*o_proj",)), 4, (1, 2, 4), ""),
        (group_of(None, 8), 4, (1, 2, 4), ""),
        (group_of(None, 8, 8), 4, (1, 2, 4), ""),
    ],
)
def test_ranks_have_whole_groups_of_quantized_columns(
    quantization: QuantizationConfig, tp: int, fit: tuple[int, ...], text: str
) -> None:
    found = faults(DENSE, Split(tp), COPIES, quantization)
    assert bool(found) == (tp not in fit)
    for reason in found:
        assert (reason.axis, reason.supported) == (TP, fit)
        assert text in reason.message


def test_ranks_have_whole_words_of_packed_codes() -> None:
    raw = {**DENSE, "intermediate_size": 40, "vocab_size": 192, "num_key_value_heads": 12}
    assert fault(raw, Split(2), COPIES, group_of(None))[2] == (1,)
    assert "m's 40 columns of mlp.down_proj in words of 8 codes" in fault(raw, Split(2), COPIES, group_of(None))[3]
    assert faults(raw, Split(2), COPIES, group_of(None, 8)) == []


def test_ranks_of_an_expert_have_whole_groups() -> None:
    axis, value, fit, message = fault(EXPERTS, Split(dp=4), COPIES, group_of(16))
    assert (axis, value, fit) == (EP, 1, (2, 4))
    assert "m's 32 columns of mlp.experts.N.down_proj in groups of 16; sizes that do: 2, 4" in message
    assert faults(EXPERTS, Split(dp=4, ep=2), COPIES, group_of(16)) == []


def test_a_whole_checkpoint_is_left_to_its_loader() -> None:
    assert faults(DENSE, Split(), COPIES, group_of(36)) == []


@pytest.mark.parametrize(
    ("raw", "asked", "named"),
    [
        (
            DENSE,
            {"tensor_parallel_size": 3},
            f"{TP}=3 does not divide deepseek_coder:custom's 4 key-value heads and 320 rows",
        ),
        (DENSE, {"pipeline_parallel_size": 4}, f"{PP}=4 leaves a stage without a layer"),
        (DENSE, {"data_parallel_size": 2, "max_num_seqs": 1}, f"{DP}=2 leaves a replica without a sequence"),
        (EXPERTS, {"data_parallel_size": 3}, "moe_intermediate_size; sizes that do: 3"),
    ],
)
def test_the_refusal_comes_before_an_engine(
    weights: Weights, raw: dict[str, Any], asked: dict[str, Any], named: str
) -> None:
    model = f"{OF_FAMILY[raw['architectures'][0]]}:custom"
    with pytest.raises(UnsupportedError) as refusal:
        resolve(EngineArgs(model=model, weights=str(weights(**raw)), hardware="cpu", dtype="bf16", **asked))
    assert named in str(refusal.value)
    assert not refusal.value.verdict.supported
    assert refusal.value.exit_code == 3


def test_what_a_source_claims_divides() -> None:
    """Every split of every vendor's row, of each variant that the row speaks of."""
    args, request = request_of()
    for family in get_registry().families.values():
        for variant in (variant for variant in family.variants if variant.config):
            for row in family.matrix.of_size(variant.size, experimental=False):
                for split in {s for y in row.parallelism for w in row.world_size for s in splits_of(y, w)}:
                    if row.source != "zoo":
                        assert variant.config
                        assert split_faults(args, request, row, variant.config, split) == [], (variant.name, split)


def test_only_splits_that_the_shape_allows_are_planned(weights: Weights) -> None:
    args = EngineArgs(model="deepseek_coder:custom", weights=str(weights(**DENSE)), hardware="cpu", dtype="bf16")
    found = [split.describe() for split in offered_splits(args, read_request(args, get_registry()))]
    assert found == [
        "1", "2", "2 (dp 2)", "2 (pp 2)", "3 (dp 3)", "3 (pp 3)", "4", "4 (tp 2, dp 2)", "4 (dp 4)", "4 (tp 2, pp 2)",
        "4 (pp 2, dp 2)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("chip", "split", "asked", "due"),
    [
        ("ascend910b", Split(4, ep=8, dp=2), None, "all_to_all"),
        ("ascend910b", Split(4, ep=8, dp=2), "auto", "all_to_all"),
        ("ascend910b", Split(4, ep=4, dp=2), "auto", "all_to_all"),
        ("ascend910b", Split(2, ep=2, dp=4), "auto", "all_gather"),
        ("ascend910b", Split(4, ep=4), "auto", "all_gather"),
        ("ascend910b", Split(4, dp=2), "auto", "all_gather"),
        ("ascend910b", Split(4, ep=8, dp=2), "all_gather", "all_gather"),
        ("ascend310p", Split(4, ep=8, dp=2), "auto", "all_gather"),
        ("cpu", Split(4, ep=8, dp=2), None, "all_gather"),
        ("cpu", Split(4, ep=8, dp=2), "all_to_all", "all_to_all"),
        ("cpu", Split(4, ep=2), "all_to_all", "all_to_all"),
    ],
)
def test_how_tokens_reach_experts(chip: str, split: Split, asked: str | None, due: str) -> None:
    assert choose_expert_dispatch(asked, split, ModelConfig.from_hf(EXPERTS), CHIPS[chip]) == due


@pytest.mark.parametrize(
    ("raw", "split", "text"),
    [
        (EXPERTS, Split(4), "with ep 1 every rank of a stage has a part of every expert; take --ep 2 or 4, or"),
        (EXPERTS, Split(2, ep=2, dp=4), "the 4 ranks that share an expert .* more than a replica's 2; take --ep 4, or"),
        (EXPERTS, Split(dp=5), "has a part of every expert; take --expert-dispatch all_gather"),
        (DENSE, Split(4), "the model has no experts; leave it out"),
    ],
)  # fmt: skip
def test_all_to_all_that_cannot_be_taken(raw: dict[str, Any], split: Split, text: str) -> None:
    with pytest.raises(ConfigError, match=f"--expert-dispatch all_to_all sends a token .*{text}"):
        choose_expert_dispatch("all_to_all", split, ModelConfig.from_hf(raw), CHIPS["cpu"])
