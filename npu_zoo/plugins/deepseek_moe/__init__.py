"""DeepSeek-MoE 16B: a dense first layer, then 64 small experts and two shared ones in every layer (arXiv:2401.06066).

Hyperparameters are those of the checkpoints' config.json. Matrix rows are the README's of the MindIE ATB model zoo
(Atlas 800I A2), and what the port to Ascend with tensor and expert parallelism states (Atlas 800T A2).
"""

from __future__ import annotations

from pathlib import Path

from npu_zoo.api import (
    EXPERT_LAYOUTS_OF_FOUR,
    LAYOUTS_OF_FOUR,
    Denial,
    FamilySpec,
    FeatureRow,
    ModelConfig,
    MoEConfig,
    VariantSpec,
    hookimpl,
    proven,
    read_records,
)
from npu_zoo.plugins.deepseek_moe.prompts import PROMPT

MINDIE = "DeepSeek-MoE README of the MindIE ATB model zoo"
PORT = "README of the DeepSeek-MoE-16B port to Ascend (TP and EP, several nodes)"

CONFIG = ModelConfig(
    architecture="DeepseekForCausalLM",
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    vocab_size=102400,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    torch_dtype="bfloat16",
    bos_token_id=100000,
    eos_token_id=(100001,),
    moe=MoEConfig(
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
    ),
)


def _variant(kind: str) -> VariantSpec:
    repository = f"deepseek-ai/deepseek-moe-16b-{kind}"
    return VariantSpec(
        name=f"16b-{kind}",
        size="16b",
        aliases=("16b",) if kind == "chat" else (),
        title=f"DeepSeek-MoE 16B {kind}",
        config=CONFIG,
        chat=kind == "chat",
        huggingface=repository,
        modelscope=repository,
    )


VARIANTS = (
    _variant("base"),
    _variant("chat"),
    VariantSpec(
        name="demo",
        size="demo",
        title="The bundled demo checkpoint: the same architecture at two million parameters",
        bundled="npu_zoo.plugins.deepseek_moe:demo",
    ),
    VariantSpec(name="custom", size="custom", title="Any checkpoint of the architecture"),
)

_QUANTIZED = ("w8a16", "w4a16", "w8a8")
_LAYOUTS = (*LAYOUTS_OF_FOUR, *EXPERT_LAYOUTS_OF_FOUR)

ROWS = (
    FeatureRow(
        sizes=("16b",),
        hardware=("atlas_800i_a2",),
        dtype=("float16",),
        world_size=(4, 8),
        attention=("paged",),
        serving=("offline", "mindie_service"),
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("16b",),
        hardware=("atlas_800t_a2",),
        dtype=("float16",),
        world_size=(8,),
        parallelism=("tp", "tp8+ep8"),
        attention=("paged",),
        source=PORT,
        derived=("dtype", "attention"),
        note="tensor parallel, or with experts over the same eight cards",
    ),
    FeatureRow(
        sizes=("16b",),
        hardware=("atlas_800t_a2",),
        dtype=("float16",),
        world_size=(16,),
        parallelism=("tp", "tp8+pp2"),
        attention=("paged",),
        source=PORT,
        derived=("dtype", "attention"),
        note="two nodes of eight cards",
    ),
    FeatureRow(
        sizes=("16b", "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=_LAYOUTS,
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        source="zoo",
    ),
    FeatureRow(
        sizes=("16b", "demo", "custom"),
        hardware=("cuda",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1,),
        attention=("paged", "flash"),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("demo",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=("paged",),
        source="zoo",
    ),
    FeatureRow(
        sizes=("16b",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("bfloat16",),
        world_size=(1, 2, 4, 8),
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("custom",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        parallelism=("tp", "tp+ep"),
        replicated_kv_heads=True,
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("16b", "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=_LAYOUTS,
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        kv_cache_dtype=("int8",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("16b", "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=_LAYOUTS,
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        quantization=_QUANTIZED,
        source="zoo",
        status="experimental",
        note="checkpoints in the layout of compressed-tensors",
    ),
    FeatureRow(
        sizes=("demo", "custom"),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=("paged",),
        kv_cache_dtype=("int8",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("demo", "custom"),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=("paged",),
        quantization=_QUANTIZED,
        source="zoo",
        status="experimental",
        note="checkpoints in the layout of compressed-tensors",
    ),
)


_A2 = ("atlas_800i_a2",)
DENIALS = (
    Denial(
        sizes=("16b", "demo", "custom"),
        hardware=(),
        axis="hardware",
        values=("atlas_300i_duo",),
        source=MINDIE,
        reason="its table has no world size for Atlas 300I Duo",
    ),
    Denial(sizes=("16b",), hardware=_A2, axis="dtype", values=("bfloat16",), source=MINDIE),
    Denial(sizes=("16b",), hardware=_A2, axis="attention", values=("flash",), source=MINDIE),
    Denial(sizes=("16b",), hardware=_A2, axis="quantization", values=("w8a8", "w8a16", "sparse"), source=MINDIE),
    Denial(sizes=("16b",), hardware=_A2, axis="kv_cache_dtype", values=("int8",), source=MINDIE),
    Denial(sizes=("16b",), hardware=_A2, axis="long_sequence", values=(True,), source=MINDIE),
    Denial(sizes=("16b",), hardware=_A2, axis="serving", values=("tgi",), source=MINDIE),
)

RECORDS = read_records(Path(__file__).parent / "evidence.json")

FAMILY = FamilySpec(
    name="deepseek_moe",
    title="DeepSeek-MoE",
    architectures=("DeepseekForCausalLM",),
    model="npu_zoo.plugins.deepseek_moe.model:DeepseekForCausalLM",
    variants=VARIANTS,
    default_variant="demo",
    prompt=PROMPT,
    rows=proven(ROWS, RECORDS),
    records=RECORDS,
    truth="npu_zoo.plugins.deepseek_moe:truth.json",
    denials=DENIALS,
    documentation="https://github.com/deepseek-ai/DeepSeek-MoE",
)


@hookimpl
def register_families() -> list[FamilySpec]:
    """The one family of this plugin."""
    return [FAMILY]
