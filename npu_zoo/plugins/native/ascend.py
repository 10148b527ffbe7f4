"""What the zoo registers for Ascend's chips: kernels and attention backends of torch_npu's fused operators."""

from __future__ import annotations

from npu_zoo.api import AttentionBackendSpec, DType, KernelSpec
from npu_zoo.plugins.native.quantized import ASCEND_QUANTIZED

_TORCH_NPU = ("TASK_QUEUE_ENABLE",)
"""What torch_npu reads on both chips. It refuses INF_NAN_MODE_ENABLE=0 on 910B, so that is left to 310P."""

_HALVES: tuple[DType, ...] = ("bfloat16", "float16")


def _ascend(
    operation: str,
    chip: str,
    dtypes: tuple[DType, ...],
    operators: tuple[str, ...],
    attribute: str = "",
    description: str = "",
) -> KernelSpec:
    return KernelSpec(
        name=f"{chip}_{operation}",
        operation=operation,
        chip=chip,
        dtypes=dtypes,
        implementation=f"npu_zoo.nn.kernels.ascend:{attribute or operation}",
        requires=("torch_npu",),
        operators=operators,
        description=description or ", ".join(operators),
    )


def _ascend_kernels() -> list[KernelSpec]:
    """What both chips share in the dtypes that each has, and what is one's own."""
    shared: dict[str, tuple[str, ...]] = {
        "rms_norm": ("npu_rms_norm",),
        "add_rms_norm": ("npu_add_rms_norm",),
        "rotary_embedding": ("npu_apply_rotary_pos_emb",),
        "silu_and_mul": ("npu_swiglu",),
    }
    own: dict[str, tuple[str, ...]] = {
        "interleaved_rotary_embedding": ("npu_interleave_rope",),
        "head_linear": ("npu_transpose_batchmatmul",),
        "route_tokens": ("npu_moe_gating_top_k",),
        "top_k_top_p": ("npu_top_k_top_p",),
        "experts": ("npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_token_unpermute"),
    }
    return [
        *(_ascend(operation, "ascend910b", _HALVES, operators) for operation, operators in (shared | own).items()),
        *(_ascend(operation, "ascend310p", ("float16",), operators) for operation, operators in shared.items()),
        KernelSpec(
            name="ascend310p_top_k_top_p",
            operation="top_k_top_p",
            chip="ascend310p",
            dtypes=("float16",),
            implementation="npu_zoo.nn.kernels.reference:top_k_top_p",
            requires=("torch_npu",),
            description="torch's own operators; the chip has none that does it at once",
        ),
        _ascend(
            "linear",
            "ascend310p",
            ("float16",),
            ("npu_format_cast",),
            "FractalLinear",
            "matmul with the weight in FRACTAL_NZ",
        ),
        _ascend(
            "linear",
            "ascend910b",
            _HALVES,
            ("npu_grouped_matmul",),
            "PartsLinear",
            "matmul on the weight as it is, stacked ones by npu_grouped_matmul",
        ),
    ]


_FUSED = ("npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score")
_OF_INT8 = ("npu_dynamic_quant", "npu_scatter_nd_update_")
_OF_ATB = (
    "empty_with_format",
    "_npu_reshape_and_cache",
    "_npu_paged_attention",
    "_npu_paged_attention_splitfuse_v2",
)

ASCEND_KERNELS = [*_ascend_kernels(), *ASCEND_QUANTIZED]

ASCEND_BACKENDS = [
    AttentionBackendSpec(
        name="ascend910b_paged",
        kind="paged",
        chip="ascend910b",
        dtypes=_HALVES,
        implementation="npu_zoo.nn.attention.ascend:FusedPagedAttention",
        reads=_TORCH_NPU,
        head_dims=(128, 64),
        block_sizes=(128, 64, 32, 16, 256, 512),
        requires=("torch_npu",),
        operators=_FUSED,
        description="npu_fused_infer_attention_score over the paged cache, for prompts, chunks and decode",
    ),
    AttentionBackendSpec(
        name="ascend910b_paged_latent",
        kind="paged",
        cache="latent",
        chip="ascend910b",
        dtypes=_HALVES,
        implementation="npu_zoo.nn.attention.ascend_latent:FusedLatentAttention",
        reads=_TORCH_NPU,
        head_dims=(512,),
        block_sizes=(128, 64, 32, 16),
        requires=("torch_npu",),
        operators=(*_FUSED, "npu_fused_infer_attention_score_v2", "npu_kv_rmsnorm_rope_cache"),
        description="fused attention over latents in blocks: absorbed for single tokens, expanded for prompts",
    ),
    AttentionBackendSpec(
        name="ascend310p_paged",
        kind="paged",
        chip="ascend310p",
        dtypes=("float16",),
        implementation="npu_zoo.nn.attention.ascend_310p:AtbPagedAttention",
        reads=(*_TORCH_NPU, "INF_NAN_MODE_ENABLE", "ATB_*"),
        head_dims=(128, 64),
        block_sizes=(128, 64),
        requires=("torch_npu",),
        operators=_OF_ATB,
        description="_npu_paged_attention and _npu_paged_attention_splitfuse_v2 over a cache in FRACTAL_NZ",
    ),
    AttentionBackendSpec(
        name="ascend310p_flash",
        kind="flash",
        chip="ascend310p",
        dtypes=("float16",),
        implementation="npu_zoo.nn.attention.ascend_310p:AtbContiguousAttention",
        reads=(*_TORCH_NPU, "INF_NAN_MODE_ENABLE", "ATB_*"),
        head_dims=(128, 64),
        prefix_caching=False,
        requires=("torch_npu",),
        operators=_OF_ATB,
        description="the same operators over one contiguous stretch per sequence",
    ),
    AttentionBackendSpec(
        name="ascend910b_flash",
        kind="flash",
        chip="ascend910b",
        dtypes=_HALVES,
        implementation="npu_zoo.nn.attention.ascend:FusedContiguousAttention",
        reads=_TORCH_NPU,
        head_dims=(128, 64),
        prefix_caching=False,
        requires=("torch_npu",),
        operators=_FUSED,
        description="npu_fused_infer_attention_score over one contiguous stretch per sequence",
    ),
    AttentionBackendSpec(
        name="ascend910b_paged_int8",
        kind="paged",
        kv_cache_dtype="int8",
        chip="ascend910b",
        dtypes=_HALVES,
        implementation="npu_zoo.nn.attention.ascend_int8:FusedInt8PagedAttention",
        reads=_TORCH_NPU,
        head_dims=(128, 64),
        block_sizes=(128, 64, 32, 256, 512),
        requires=("torch_npu",),
        operators=(*_FUSED, *_OF_INT8),
        description="int8 keys and values in blocks, which decode reads as they are; prompts read them restored",
    ),
    AttentionBackendSpec(
        name="ascend910b_flash_int8",
        kind="flash",
        kv_cache_dtype="int8",
        chip="ascend910b",
        dtypes=_HALVES,
        implementation="npu_zoo.nn.attention.ascend_int8:FusedInt8ContiguousAttention",
        reads=_TORCH_NPU,
        head_dims=(128, 64),
        prefix_caching=False,
        requires=("torch_npu",),
        operators=(*_FUSED, *_OF_INT8),
        description="the same over one contiguous stretch per sequence",
    ),
]
