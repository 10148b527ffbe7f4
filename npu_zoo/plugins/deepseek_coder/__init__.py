"""DeepSeek-Coder: Llama-shaped code models with fill in the middle.

Hyperparameters are those of the checkpoints' config.json; matrix rows are the README's of the MindIE ATB model zoo
(Atlas 800I A2, 300I Duo) and of MindFormers (33B on four 910B cards, Atlas 800T A2).
"""

from __future__ import annotations

from pathlib import Path

from npu_zoo.api import (
    LAYOUTS_OF_FOUR,
    Attention,
    Denial,
    EvaluationFormat,
    FamilySpec,
    FeatureRow,
    FimFormat,
    ModelConfig,
    PromptFormat,
    RopeScaling,
    VariantSpec,
    hookimpl,
    proven,
    read_records,
)

MINDIE = "DeepSeek-Coder README of the MindIE ATB model zoo"
MINDFORMERS = "DeepSeek-Coder README of MindFormers"

_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\\n"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}"
    "{{ '" + _SYSTEM + "' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n' }}"
    "{%- else -%}{{ '### Response:\\n' + message['content'] + '\\n<|EOT|>\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)

# As the family's own evaluation of its instruct models on HumanEval asks them.
EVALUATION = EvaluationFormat(
    instruction=(
        "Please continue to complete the function. You are not allowed to modify the given code and do the completion "
        "only. Please return all completed function in a codeblock. Here is the given code to do completion:\n"
        "```python\n{prompt}\n```"
    )
)


def _shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    eos: int,
    bos: int = 32013,
    pad: int | None = 32014,
    vocab: int = 32256,
    positions: int = 16384,
    theta: float = 100000.0,
    factor: float = 4.0,
) -> ModelConfig:
    scaling = RopeScaling() if factor == 1.0 else RopeScaling(kind="linear", factor=factor)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6,
        rope_theta=theta,
        rope_scaling=scaling,
        torch_dtype="bfloat16",
        bos_token_id=bos,
        eos_token_id=(eos,),
        pad_token_id=pad,
    )


def _pair(size: str, hub: str, shape: tuple[int, int, int, int, int], **special: float) -> list[VariantSpec]:
    """The base and the instruct variant of one size; ``hub`` has a ``{}`` where the repository names the kind."""
    variants = []
    eos = {"base": special.pop("eos_base", 32014), "instruct": special.pop("eos_instruct", 32021)}
    for kind in ("base", "instruct"):
        repository = "deepseek-ai/" + hub.format(kind)
        variants.append(
            VariantSpec(
                name=f"{size}-{kind}",
                size=size,
                aliases=(size,) if kind == "instruct" else (),
                title=f"DeepSeek-Coder {size.upper()} {kind}" + (" v1.5" if size == "7b" else ""),
                config=_shape(*shape, eos=int(eos[kind]), **special),  # type: ignore[arg-type]
                chat=kind == "instruct",
                huggingface=repository,
                modelscope=repository,
            )
        )
    return variants


_V1_5 = {"vocab": 102400, "positions": 4096, "theta": 10000.0, "factor": 1.0, "bos": 100000, "pad": None}

VARIANTS = (
    *_pair("1.3b", "deepseek-coder-1.3b-{}", (2048, 5504, 24, 16, 16)),
    *_pair("6.7b", "deepseek-coder-6.7b-{}", (4096, 11008, 32, 32, 32)),
    *_pair(
        "7b",
        "deepseek-coder-7b-{}-v1.5",
        (4096, 11008, 30, 32, 32),
        eos_base=100001,
        eos_instruct=100015,
        **_V1_5,  # type: ignore[arg-type]
    ),
    *_pair("33b", "deepseek-coder-33b-{}", (7168, 19200, 62, 56, 8)),
    VariantSpec(
        name="demo",
        size="demo",
        title="The bundled demo checkpoint: the same architecture at a few million parameters",
        bundled="npu_zoo.plugins.deepseek_coder:demo",
    ),
    VariantSpec(name="custom", size="custom", title="Any checkpoint of the architecture"),
)

_SIZES = ("1.3b", "6.7b", "7b", "33b")
_BOTH: tuple[Attention, ...] = ("paged", "flash")

_QUANTIZED = ("w8a16", "w4a16", "w8a8")


ROWS = (
    FeatureRow(
        sizes=("1.3b",),
        hardware=("atlas_800i_a2",),
        dtype=("bfloat16",),
        world_size=(1, 2, 4, 8),
        attention=_BOTH,
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("6.7b", "7b"),
        hardware=("atlas_800i_a2",),
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        attention=_BOTH,
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("6.7b", "7b"),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(2, 4),
        attention=_BOTH,
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("33b",),
        hardware=("atlas_800i_a2",),
        dtype=("bfloat16",),
        world_size=(4, 8),
        attention=_BOTH,
        source=MINDIE,
    ),
    FeatureRow(
        sizes=("33b",),
        hardware=("atlas_800t_a2",),
        dtype=("float16",),
        world_size=(4,),
        attention=_BOTH,
        source=MINDFORMERS,
        derived=("dtype", "attention"),
        note="910B and four cards are stated; dtype and attention are derived from its configuration",
    ),
    FeatureRow(
        sizes=(*_SIZES, "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=_BOTH,
        source="zoo",
    ),
    FeatureRow(
        sizes=(*_SIZES, "demo", "custom"),
        hardware=("cuda",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1,),
        attention=_BOTH,
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("demo",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=_BOTH,
        source="zoo",
    ),
    FeatureRow(
        sizes=("demo",),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1,),
        attention=_BOTH,
        source="zoo",
    ),
    FeatureRow(
        sizes=("custom",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1, 2, 4, 8),
        replicated_kv_heads=True,
        attention=_BOTH,
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("custom",),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1, 2, 4),
        replicated_kv_heads=True,
        attention=_BOTH,
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=(*_SIZES, "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=_BOTH,
        kv_cache_dtype=("int8",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=(*_SIZES, "demo", "custom"),
        hardware=("cpu",),
        dtype=("float32", "bfloat16", "float16"),
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=_BOTH,
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
        attention=_BOTH,
        kv_cache_dtype=("int8",),
        source="zoo",
        status="experimental",
    ),
    FeatureRow(
        sizes=("demo", "custom"),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("float16", "bfloat16"),
        world_size=(1,),
        attention=_BOTH,
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
        attention=_BOTH,
        quantization=("w8a8",),
        source="zoo",
        status="experimental",
        note="int8 weights and activations, which the chip's operators take",
    ),
)


_ASCEND = ("atlas_800i_a2", "atlas_300i_duo")
DENIALS = (
    Denial(sizes=("1.3b", "33b"), hardware=(), axis="hardware", values=("atlas_300i_duo",), source=MINDIE),
    Denial(sizes=("1.3b", "33b"), hardware=("atlas_800i_a2",), axis="dtype", values=("float16",), source=MINDIE),
    Denial(
        sizes=_SIZES,
        hardware=("atlas_300i_duo",),
        axis="dtype",
        values=("bfloat16",),
        source=MINDIE,
        reason="bfloat16 on Atlas 800I A2 only",
    ),
    Denial(
        sizes=_SIZES,
        hardware=_ASCEND,
        axis="quantization",
        values=("w8a8", "w8a16", "sparse"),
        source=MINDIE,
    ),
    Denial(sizes=_SIZES, hardware=_ASCEND, axis="kv_cache_dtype", values=("int8",), source=MINDIE),
    Denial(sizes=_SIZES, hardware=_ASCEND, axis="long_sequence", values=(True,), source=MINDIE),
    Denial(sizes=_SIZES, hardware=_ASCEND, axis="serving", values=("mindie_service", "tgi"), source=MINDIE),
)

# What the MindIE start script exports; a variable that the user has set is left alone.
_ATB = {
    "ATB_LAYER_INTERNAL_TENSOR_REUSE": "1",
    "INF_NAN_MODE_ENABLE": "0",
    "ATB_OPERATION_EXECUTE_ASYNC": "1",
    "TASK_QUEUE_ENABLE": "1",
    "ATB_CONVERT_NCHW_TO_ND": "1",
    "ATB_WORKSPACE_MEM_ALLOC_GLOBAL": "1",
    "ATB_CONTEXT_WORKSPACE_SIZE": "0",
}

RECORDS = read_records(Path(__file__).parent / "evidence.json")

FAMILY = FamilySpec(
    name="deepseek_coder",
    title="DeepSeek-Coder",
    architectures=("LlamaForCausalLM",),
    model="npu_zoo.plugins.deepseek_coder.model:DeepseekCoderForCausalLM",
    variants=VARIANTS,
    default_variant="demo",
    prompt=PromptFormat(chat_template=CHAT_TEMPLATE, adds_bos=True),
    fim=FimFormat(begin="<｜fim▁begin｜>", hole="<｜fim▁hole｜>", end="<｜fim▁end｜>"),
    evaluation=EVALUATION,
    rows=proven(ROWS, RECORDS),
    records=RECORDS,
    truth="npu_zoo.plugins.deepseek_coder:truth.json",
    denials=DENIALS,
    environment=dict.fromkeys(_ASCEND, _ATB),
    documentation="https://github.com/deepseek-ai/DeepSeek-Coder",
)


@hookimpl
def register_families() -> list[FamilySpec]:
    """The one family of this plugin."""
    return [FAMILY]
