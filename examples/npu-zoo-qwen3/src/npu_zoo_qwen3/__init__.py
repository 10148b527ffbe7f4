"""Qwen3's dense models for npu-zoo: what this plugin registers. Importing it imports no torch.

Hyperparameters are those of the checkpoints' config.json on huggingface.co/Qwen. Code is named in the specs and
imported where it is used: the model in ``model``, kernels in ``kernels`` and ``ascend``, the quantization method in
``int8_rows`` and, as far as it takes torch, ``weights``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from npu_zoo.api import (
    LAYOUTS_OF_FOUR,
    Attention,
    DType,
    FamilySpec,
    FeatureRow,
    KernelSpec,
    ModelConfig,
    QuantizationSpec,
    VariantSpec,
    hookimpl,
)
from npu_zoo_qwen3.int8_rows import QUANT_METHOD, SCHEME
from npu_zoo_qwen3.prompts import PROMPT, REASONING

if TYPE_CHECKING:
    import typer

SOURCE = "npu-zoo-qwen3"
"""Who claims the rows for CPUs: this package, whose tests run them."""

ARCHITECTURE = "Qwen3ForCausalLM"
HEAD_NORM = "head_rms_norm"
"""The operation that this family adds to the shared ones; its reference is in :mod:`npu_zoo_qwen3.kernels`."""

_ALL: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_BOTH: tuple[Attention, ...] = ("paged", "flash")
_END_OF_TURN, _END_OF_TEXT = 151645, 151643


def _variant(size: str, hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False) -> VariantSpec:
    """The chat variant of one size; all sizes have eight key-value heads of 128 values."""
    repository = f"Qwen/Qwen3-{size.upper()}"
    config = ModelConfig(
        architecture=ARCHITECTURE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
        bos_token_id=_END_OF_TEXT,
        eos_token_id=(_END_OF_TURN, _END_OF_TEXT),
    )
    return VariantSpec(
        name=f"{size}-chat",
        size=size,
        aliases=(size,),
        title=f"Qwen3 {size.upper()}",
        config=config,
        chat=True,
        huggingface=repository,
        modelscope=repository,
        stop_token_ids=(_END_OF_TURN, _END_OF_TEXT),
        reasoning=REASONING,
    )


VARIANTS = (
    _variant("0.6b", 1024, 3072, 28, 16, tied=True),
    _variant("1.7b", 2048, 6144, 28, 16, tied=True),
    _variant("4b", 2560, 9728, 36, 32, tied=True),
    _variant("8b", 4096, 12288, 36, 32),
    _variant("14b", 5120, 17408, 40, 40),
    _variant("32b", 5120, 25600, 64, 64),
    VariantSpec(
        name="custom", size="custom", title="Any checkpoint of the architecture", chat=True, reasoning=REASONING
    ),
)

ROWS = (
    FeatureRow(
        sizes=("0.6b", "1.7b", "4b", "8b", "14b", "32b", "custom"),
        hardware=("cpu",),
        dtype=_ALL,
        world_size=(1, 2, 3, 4),
        parallelism=LAYOUTS_OF_FOUR,
        replicated_kv_heads=True,
        attention=_BOTH,
        quantization=("none", SCHEME),
        source=SOURCE,
    ),
    FeatureRow(
        sizes=("0.6b", "1.7b", "4b", "8b", "14b", "custom"),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("bfloat16",),
        world_size=(1, 2, 4, 8),
        attention=_BOTH,
        source="derived",
        derived=("world_size", "attention"),
        status="experimental",
        note="the checkpoints' dtype, and the worlds that share their heads and widths evenly",
    ),
    FeatureRow(
        sizes=("32b",),
        hardware=("atlas_800i_a2", "atlas_800t_a2"),
        dtype=("bfloat16",),
        world_size=(2, 4, 8),
        attention=_BOTH,
        source="derived",
        derived=("world_size", "attention"),
        status="experimental",
        note="one device of 64 GiB does not hold the weights",
    ),
    FeatureRow(
        sizes=("0.6b", "1.7b", "4b", "8b", "custom"),
        hardware=("atlas_300i_duo",),
        dtype=("float16",),
        world_size=(1, 2, 4),
        attention=_BOTH,
        source="derived",
        derived=("dtype", "world_size", "attention"),
        status="experimental",
        note="the chip has no bfloat16, which the checkpoints are in",
    ),
)

FAMILY = FamilySpec(
    name="qwen3",
    title="Qwen3",
    architectures=(ARCHITECTURE,),
    model="npu_zoo_qwen3.model:Qwen3ForCausalLM",
    variants=VARIANTS,
    default_variant="0.6b",
    prompt=PROMPT,
    config_defaults={ARCHITECTURE: {"head_dim": 128}},  # transformers' own, which is not hidden_size over heads
    operations=(HEAD_NORM,),
    rows=ROWS,
    documentation="https://github.com/QwenLM/Qwen3",
)


def _kernel(
    operation: str,
    chip: str,
    implementation: str,
    description: str,
    *,
    dtypes: tuple[DType, ...] = _ALL,
    inputs: str | None = None,
    operators: tuple[str, ...] = (),
) -> KernelSpec:
    is_reference = chip == "any"
    return KernelSpec(
        name=f"qwen3_{operation}_{'reference' if is_reference else chip}",
        operation=operation,
        chip=chip,
        dtypes=dtypes,
        implementation=f"npu_zoo_qwen3.{implementation}",
        priority=0 if is_reference else 10,
        requires=("torch_npu",) if operators else (),
        operators=operators,
        inputs=inputs and f"npu_zoo_qwen3.{inputs}",
        description=description,
    )


@hookimpl
def register_families() -> list[FamilySpec]:
    """Qwen3."""
    return [FAMILY]


@hookimpl
def register_kernels() -> list[KernelSpec]:
    """The norm of heads, and the product with weights that have a scale per row."""
    fused, norm = ("npu_rms_norm",), "ascend:head_rms_norm"
    product, told = f"linear_{SCHEME}", "torch's own rms_norm, rounded once"
    return [
        _kernel(HEAD_NORM, "any", "kernels:head_rms_norm", "plain torch", inputs="kernels:head_norm_inputs"),
        _kernel(HEAD_NORM, "cpu", "kernels:fused_head_rms_norm", told),
        _kernel(HEAD_NORM, "ascend910b", norm, "npu_rms_norm", dtypes=("bfloat16", "float16"), operators=fused),
        _kernel(HEAD_NORM, "ascend310p", norm, "npu_rms_norm", dtypes=("float16",), operators=fused),
        _kernel(product, "any", "kernels:DequantizedRows", "the whole weight restored", inputs="kernels:linear_inputs"),
        _kernel(product, "cpu", "kernels:ScaledProduct", "blocks of codes multiplied, then scaled"),
    ]


@hookimpl
def register_quantization_methods() -> list[QuantizationSpec]:
    """Int8 with a float32 scale per output channel, in a layout of this package's own."""
    return [
        QuantizationSpec(
            name=SCHEME,
            weight_bits=8,
            activation_bits=16,
            chips=("any",),
            method="npu_zoo_qwen3.weights:Int8Rows",
            quant_method=QUANT_METHOD,
            reader="npu_zoo_qwen3.int8_rows:read_section",
            example="npu_zoo_qwen3.weights:quantize_checkpoint",
            description="int8 weights with a float32 scale per output channel, activations in the compute dtype",
        )
    ]


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """``npu-zoo qwen3 quantize``."""
    from npu_zoo_qwen3.commands import group

    app.add_typer(group, name="qwen3")
