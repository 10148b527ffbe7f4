"""DeepSeek-V3 and its relatives with latent attention: V3.1 and R1 in the same shape, V2 and V2-Lite beside it.

Hyperparameters are those of the checkpoints' config.json. The rows of 671b are what "DeepSeek-V3 for Ascend" supports;
it states no world size but the eight-way layout of its int4 weights, so the others follow from 64 GB a card.
"""

from __future__ import annotations

from pathlib import Path

from npu_zoo.api import (
    EXPERT_LAYOUTS_OF_FOUR,
    LAYOUTS_OF_FOUR,
    Denial,
    FamilySpec,
    FeatureRow,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    PromptFormat,
    ReasoningFormat,
    RopeScaling,
    ToolFormat,
    VariantSpec,
    hookimpl,
    proven,
    read_records,
)
from npu_zoo.plugins.deepseek_v3.prompts import PROMPT, R1_PROMPT, REASONING, TOOLS, V2_PROMPT, V31_TOOLS

ASCEND = "README of DeepSeek-V3 for Ascend"
NO_MLA = "Atlas 300I Duo has no operators for latent attention (MLA)"


def _yarn(mscale: float) -> RopeScaling:
    parameters: dict[str, float] = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
    parameters |= {"mscale": mscale, "mscale_all_dim": mscale}
    return RopeScaling(kind="yarn", factor=40.0, parameters=parameters)


def _latent(q_lora_rank: int | None) -> MLAConfig:
    return MLAConfig(
        kv_lora_rank=512, q_lora_rank=q_lora_rank, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )


V3 = ModelConfig(
    architecture="DeepseekV3ForCausalLM",
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    head_dim=192,
    vocab_size=129280,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=_yarn(1.0),
    torch_dtype="bfloat16",
    bos_token_id=0,
    eos_token_id=(1,),
    moe=MoEConfig(
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    mla=_latent(1536),
)

V2_LITE = ModelConfig(
    architecture="DeepseekV2ForCausalLM",
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=192,
    vocab_size=102400,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=_yarn(0.707),
    torch_dtype="bfloat16",
    bos_token_id=100000,
    eos_token_id=(100001,),
    moe=MoEConfig(
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        topk_method="greedy",
        scoring_func="softmax",
    ),
    mla=_latent(None),
)

# As published with the 236b checkpoints (arXiv:2405.04434).
V2 = ModelConfig(
    architecture="DeepseekV2ForCausalLM",
    hidden_size=5120,
    intermediate_size=12288,
    num_hidden_layers=60,
    num_attention_heads=128,
    num_key_value_heads=128,
    head_dim=192,
    vocab_size=102400,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=_yarn(0.707),
    torch_dtype="bfloat16",
    bos_token_id=100000,
    eos_token_id=(100001,),
    moe=MoEConfig(
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        routed_scaling_factor=16.0,
    ),
    mla=_latent(1536),
)


def _variant(
    name: str,
    size: str,
    hub: str,
    config: ModelConfig,
    *,
    aliases: tuple[str, ...] = (),
    chat: bool = True,
    prompt: PromptFormat | None = None,
    reasoning: ReasoningFormat | None = None,
    tools: ToolFormat | None = None,
) -> VariantSpec:
    return VariantSpec(
        name=name,
        size=size,
        aliases=aliases,
        title=hub,
        config=config,
        chat=chat,
        huggingface=f"deepseek-ai/{hub}",
        modelscope=f"deepseek-ai/{hub}",
        prompt=prompt,
        reasoning=reasoning,
        tools=tools,
    )


VARIANTS = (
    _variant("671b-v3", "671b", "DeepSeek-V3", V3, aliases=("671b", "v3"), tools=TOOLS),
    _variant("671b-v3.1", "671b", "DeepSeek-V3.1", V3, aliases=("v3.1",), reasoning=REASONING, tools=V31_TOOLS),
    _variant("671b-r1", "671b", "DeepSeek-R1", V3, aliases=("r1",), prompt=R1_PROMPT, reasoning=REASONING, tools=TOOLS),
    _variant("671b-base", "671b", "DeepSeek-V3-Base", V3, chat=False),
    _variant("v2-lite-chat", "v2-lite", "DeepSeek-V2-Lite-Chat", V2_LITE, aliases=("v2-lite",), prompt=V2_PROMPT),
    _variant("v2-lite-base", "v2-lite", "DeepSeek-V2-Lite", V2_LITE, chat=False, prompt=V2_PROMPT),
    _variant("v2-236b-chat", "v2-236b", "DeepSeek-V2-Chat", V2, aliases=("v2-236b",), prompt=V2_PROMPT),
    _variant("v2-236b-base", "v2-236b", "DeepSeek-V2", V2, chat=False, prompt=V2_PROMPT),
    VariantSpec(
        name="demo",
        size="demo",
        title="The bundled demo checkpoint: the same architecture at three million parameters",
        bundled="npu_zoo.plugins.deepseek_v3:demo",
        tools=TOOLS,
    ),
    VariantSpec(name="custom", size="custom", title="Any checkpoint of the architecture", tools=TOOLS),
)

_REAL = ("671b", "v2-lite", "v2-236b")
_ALL = (*_REAL, "demo", "custom")
_A2 = ("atlas_800i_a2", "atlas_800t_a2")


def _row_671b(world_size: int, quantization: str, note: str, derived: tuple[str, ...] = ()) -> FeatureRow:
    return FeatureRow(
        sizes=("671b",),
        hardware=("atlas_800i_a2",),
        dtype=("bfloat16",),
        world_size=(world_size,),
        parallelism=(f"tp{world_size}+ep{world_size}",),
        attention=("paged",),
        quantization=(quantization,),
        source=ASCEND,
        derived=("dtype", "attention", *derived),
        note=note,
    )


_QUANTIZED = ("w8a16", "w4a16", "w8a8")
_LAYOUTS = (*LAYOUTS_OF_FOUR, *EXPERT_LAYOUTS_OF_FOUR)

ROWS = (
    _row_671b(32, "none", "bfloat16 weights: 1.34 TB on 64 GB cards", ("world_size",)),
    _row_671b(16, "w8a16", "int8 weights: 671 GB on 64 GB cards", ("world_size",)),
    _row_671b(8, "w4a16", "int4 weights: about 335 GB; the source's eight-way layout", ("world_size",)),
    FeatureRow(
        sizes=_ALL,
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=_LAYOUTS,
        attention=("paged",),
        source="zoo",
        note="latents are kept in blocks only",
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cuda",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1,),
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("v2-lite",),
        hardware=_A2,
        dtype=("bfloat16",),
        world_size=(1, 2, 4, 8),
        parallelism=("tp", "tp+ep"),
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("v2-236b",),
        hardware=_A2,
        dtype=("bfloat16",),
        world_size=(16,),
        parallelism=("tp16+ep16",),
        attention=("paged",),
        source="zoo",
        status="experimental",
        note="472 GB of weights on 64 GB cards",
    ),
    FeatureRow(
        sizes=("demo",),
        hardware=_A2,
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=("paged",),
        source="zoo",
    ),
    FeatureRow(
        sizes=("custom",),
        hardware=_A2,
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        parallelism=("tp", "tp+ep"),
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=_LAYOUTS,
        attention=("paged",),
        quantization=_QUANTIZED,
        source="zoo",
        status="experimental",
        note="checkpoints in the layout of compressed-tensors",
    ),
    FeatureRow(
        sizes=("demo", "custom"),
        hardware=_A2,
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=("paged",),
        quantization=_QUANTIZED,
        source="zoo",
        status="experimental",
        note="checkpoints in the layout of compressed-tensors",
    ),
)

DENIALS = (
    Denial(sizes=_ALL, hardware=(), axis="hardware", values=("atlas_300i_duo",), source="zoo", reason=NO_MLA),
    Denial(
        sizes=_ALL,
        hardware=("cpu", "cuda", *_A2),
        axis="attention",
        values=("flash",),
        source="zoo",
        reason="latents are kept in blocks only",
    ),
    Denial(
        sizes=_ALL,
        hardware=("cpu", "cuda", *_A2),
        axis="kv_cache_dtype",
        values=("int8",),
        source="zoo",
        reason="rounding a latent rounds every head's keys and values at once, and the chip's operator restores none",
    ),
)

RECORDS = read_records(Path(__file__).parent / "evidence.json")

FAMILY = FamilySpec(
    name="deepseek_v3",
    title="DeepSeek-V3",
    architectures=("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"),
    model="npu_zoo.plugins.deepseek_v3.model:DeepseekV3ForCausalLM",
    variants=VARIANTS,
    default_variant="demo",
    prompt=PROMPT,
    config_defaults={"DeepseekV3ForCausalLM": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}},
    conversions={"fp8": "npu-zoo convert {source} {target} --to hf-safetensors"},
    rows=proven(ROWS, RECORDS),
    records=RECORDS,
    truth="npu_zoo.plugins.deepseek_v3:truth.json",
    denials=DENIALS,
    documentation="https://github.com/deepseek-ai/DeepSeek-V3",
)


@hookimpl
def register_families() -> list[FamilySpec]:
    """The one family of this plugin."""
    return [FAMILY]
