"""WizardCoder: Llama-shaped code models that follow instructions.

Hyperparameters are those of the checkpoints' config.json; matrix rows are the README's of the MindIE ATB model zoo,
which speaks of 34B alone. The siblings of its shape come along as experimental rows; 15B is another architecture.
"""

from __future__ import annotations

from pathlib import Path

from npu_zoo.api import (
    LAYOUTS_OF_FOUR,
    Denial,
    FamilySpec,
    FeatureRow,
    ModelConfig,
    RopeScaling,
    VariantSpec,
    hookimpl,
    proven,
    read_records,
)
from npu_zoo.plugins.wizardcoder.prompts import EVALUATION, PROMPT

MINDIE = "WizardCoder README of the MindIE ATB model zoo"


def _shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=32001,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        torch_dtype="float16",
        bos_token_id=1,
        eos_token_id=(2,),
    )


# Another base model: the tokenizer, the positions and the end of text are that one's.
_V1_1 = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=7168,
    intermediate_size=19200,
    num_hidden_layers=62,
    num_attention_heads=56,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32256,
    max_position_embeddings=16384,
    rms_norm_eps=1e-6,
    rope_theta=1e5,
    rope_scaling=RopeScaling(kind="linear", factor=4.0),
    torch_dtype="bfloat16",
    bos_token_id=32013,
    eos_token_id=(32014,),
    pad_token_id=32014,
)


def _variant(size: str, hub: str, config: ModelConfig, *, modelscope: bool = False) -> VariantSpec:
    return VariantSpec(
        name=f"{size}-instruct",
        size=size,
        aliases=(size,),
        title=hub.partition("/")[2],
        config=config,
        chat=True,
        huggingface=hub,
        modelscope=hub.replace("WizardLMTeam", "AI-ModelScope") if modelscope else "",
    )


VARIANTS = (
    _variant("34b", "WizardLMTeam/WizardCoder-Python-34B-V1.0", _shape(8192, 22016, 48, 64, 8), modelscope=True),
    _variant("13b", "WizardLMTeam/WizardCoder-Python-13B-V1.0", _shape(5120, 13824, 40, 40, 40), modelscope=True),
    _variant("7b", "WizardLMTeam/WizardCoder-Python-7B-V1.0", _shape(4096, 11008, 32, 32, 32)),
    _variant("33b-v1.1", "WizardLMTeam/WizardCoder-33B-V1.1", _V1_1),
    VariantSpec(
        name="demo",
        size="demo",
        title="The bundled demo checkpoint: the same architecture at a million parameters",
        chat=True,
        bundled="npu_zoo.plugins.wizardcoder:demo",
    ),
    VariantSpec(name="custom", size="custom", title="Any checkpoint of the architecture", chat=True),
)

_SIBLINGS = ("13b", "7b", "33b-v1.1")
_ALL = ("34b", *_SIBLINGS, "demo", "custom")

_QUANTIZED = ("w8a16", "w4a16", "w8a8")


ROWS = (
    FeatureRow(
        sizes=("34b",),
        hardware=("atlas_800i_a2",),
        dtype=("float16", "bfloat16"),
        world_size=(4, 8),
        attention=("paged",),
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("34b",),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(4, 8),
        attention=("paged",),
        source=MINDIE,
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        source="zoo",
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cuda",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1,),
        attention=("paged", "flash"),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("7b", "13b"),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("33b-v1.1",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("bfloat16",),
        world_size=(2, 4, 8),
        attention=("paged",),
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
        sizes=("demo",),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1,),
        attention=("paged",),
        source="zoo",
    ),
    FeatureRow(
        sizes=("custom",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        replicated_kv_heads=True,
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("7b", "custom"),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1, 2, 4),
        replicated_kv_heads=True,
        attention=("paged",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        kv_cache_dtype=("int8",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=_ALL,
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
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
    FeatureRow(
        sizes=("demo", "custom"),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1,),
        attention=("paged",),
        quantization=("w8a8",),
        source="zoo",
        status="experimental",
        note="int8 weights and activations, which the chip's operators take",
    ),
)


_ASCEND = ("atlas_800i_a2", "atlas_300i_duo")
DENIALS = (
    Denial(
        sizes=("34b",),
        hardware=("atlas_300i_duo",),
        axis="dtype",
        values=("bfloat16",),
        source=MINDIE,
        reason="its table offers bfloat16 for Atlas 800I A2; the 300I Duo has none",
    ),
    Denial(
        sizes=("34b",),
        hardware=_ASCEND,
        axis="attention",
        values=("flash",),
        source=MINDIE,
        reason="its table offers paged attention only, though its FAQ names a flash script",
    ),
    Denial(sizes=("34b",), hardware=_ASCEND, axis="quantization", values=("w8a8", "w8a16", "sparse"), source=MINDIE),
    Denial(sizes=("34b",), hardware=_ASCEND, axis="kv_cache_dtype", values=("int8",), source=MINDIE),
    Denial(sizes=("34b",), hardware=_ASCEND, axis="long_sequence", values=(True,), source=MINDIE),
    Denial(sizes=("34b",), hardware=_ASCEND, axis="serving", values=("mindie_service", "tgi"), source=MINDIE),
)

RECORDS = read_records(Path(__file__).parent / "evidence.json")

FAMILY = FamilySpec(
    name="wizardcoder",
    title="WizardCoder",
    architectures=("LlamaForCausalLM",),
    model="npu_zoo.plugins.wizardcoder.model:WizardCoderForCausalLM",
    variants=VARIANTS,
    default_variant="demo",
    prompt=PROMPT,
    evaluation=EVALUATION,
    rows=proven(ROWS, RECORDS),
    records=RECORDS,
    truth="npu_zoo.plugins.wizardcoder:truth.json",
    denials=DENIALS,
    documentation="https://github.com/nlpxucan/WizardLM",
)


@hookimpl
def register_families() -> list[FamilySpec]:
    """The one family of this plugin."""
    return [FAMILY]
