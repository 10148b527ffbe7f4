"""The zoo's own engine, kernels, attention backends and checkpoint formats, registered like anybody's."""

from __future__ import annotations

from npu_zoo.api import AttentionBackendSpec, DType, EngineSpec, KernelSpec, WeightFormatSpec, hookimpl

_ALL: tuple[DType, ...] = ("float32", "bfloat16", "float16")


def _reference(operation: str, attribute: str) -> KernelSpec:
    return KernelSpec(
        name=f"reference_{operation}",
        operation=operation,
        chip="any",
        dtypes=_ALL,
        implementation=f"npu_zoo.nn.kernels.reference:{attribute}",
        priority=0,
        description="plain torch, the oracle of every other kernel",
    )


def _cpu(operation: str, implementation: str, description: str, dtypes: tuple[DType, ...] = _ALL) -> KernelSpec:
    return KernelSpec(
        name=f"cpu_{operation}",
        operation=operation,
        chip="cpu",
        dtypes=dtypes,
        implementation=f"npu_zoo.nn.kernels.{implementation}",
        description=description,
    )


@hookimpl
def register_kernels() -> list[KernelSpec]:
    """The reference of every operation, and what a CPU runs."""
    return [
        _reference("rms_norm", "rms_norm"),
        _reference("add_rms_norm", "add_rms_norm"),
        _reference("rotary_embedding", "rotary_embedding"),
        _reference("interleaved_rotary_embedding", "interleaved_rotary_embedding"),
        _reference("head_linear", "head_linear"),
        _reference("silu_and_mul", "silu_and_mul"),
        _reference("linear", "Linear"),
        _reference("route_tokens", "route_tokens"),
        _reference("experts", "experts"),
        _cpu("rms_norm", "reference:rms_norm", "torch's own operators"),
        _cpu("add_rms_norm", "reference:add_rms_norm", "torch's own operators"),
        _cpu("rotary_embedding", "cpu:rotary_embedding", "torch's own operators, written in place"),
        _cpu(
            "interleaved_rotary_embedding",
            "cpu:interleaved_rotary_embedding",
            "torch's own operators, written in place",
        ),
        _cpu("head_linear", "cpu:head_linear", "torch's own operators, by the number of rows"),
        _cpu("silu_and_mul", "cpu:silu_and_mul", "torch's own operators, written in place"),
        _cpu("route_tokens", "reference:route_tokens", "torch's own operators, in float32"),
        _cpu("experts", "cpu:experts", "tokens sorted by expert, a product per expert that was hit"),
        _cpu("linear", "cpu:PackedLinear", "oneDNN, with the weight in its own layout", ("float32", "bfloat16")),
        KernelSpec(
            name="cpu_plain_linear",
            operation="linear",
            chip="cpu",
            dtypes=_ALL,
            implementation="npu_zoo.nn.kernels.reference:Linear",
            priority=5,
            description="torch's own operator, on the weight as it is",
        ),
        *_ascend_kernels(),
    ]


_TORCH_NPU = ("TASK_QUEUE_ENABLE",)
"""What torch_npu reads on both chips. It refuses INF_NAN_MODE_ENABLE=0 on 910B, so that is left to 310P."""

_HALVES: tuple[DType, ...] = ("bfloat16", "float16")


def _ascend(operation: str, description: str, chip: str, dtypes: tuple[DType, ...], attribute: str = "") -> KernelSpec:
    return KernelSpec(
        name=f"{chip}_{operation}",
        operation=operation,
        chip=chip,
        dtypes=dtypes,
        implementation=f"npu_zoo.nn.kernels.ascend:{attribute or operation}",
        requires=("torch_npu",),
        description=description,
    )


def _ascend_kernels() -> list[KernelSpec]:
    """What both chips share in the dtypes that each has, and what is one's own."""
    shared = {
        "rms_norm": "npu_rms_norm",
        "add_rms_norm": "npu_add_rms_norm",
        "rotary_embedding": "npu_apply_rotary_pos_emb",
        "silu_and_mul": "npu_swiglu",
    }
    own = {
        "interleaved_rotary_embedding": "npu_interleave_rope",
        "head_linear": "npu_transpose_batchmatmul",
        "route_tokens": "npu_moe_gating_top_k",
        "experts": "npu_moe_init_routing_v2, npu_grouped_matmul, npu_moe_token_unpermute",
    }
    return [
        *(_ascend(operation, text, "ascend910b", _HALVES) for operation, text in (shared | own).items()),
        *(_ascend(operation, text, "ascend310p", ("float16",)) for operation, text in shared.items()),
        _ascend("linear", "matmul with the weight in FRACTAL_NZ", "ascend310p", ("float16",), "FractalLinear"),
        _ascend(
            "linear",
            "matmul on the weight as it is, stacked ones by npu_grouped_matmul",
            "ascend910b",
            _HALVES,
            "PartsLinear",
        ),
    ]


@hookimpl
def register_attention_backends() -> list[AttentionBackendSpec]:
    """Paged and contiguous attention in plain torch, on any device that torch drives."""
    return [
        AttentionBackendSpec(
            name="torch_paged",
            kind="paged",
            chip="any",
            dtypes=_ALL,
            implementation="npu_zoo.nn.attention.paged:PagedAttention",
            block_sizes=(64, 32, 16, 128, 8, 4, 2, 1, 256),
            priority=0,
            description="blocks behind a block table, which decode reads in place",
        ),
        AttentionBackendSpec(
            name="torch_paged_latent",
            kind="paged",
            cache="latent",
            chip="any",
            dtypes=_ALL,
            implementation="npu_zoo.nn.attention.latent:PagedLatentAttention",
            block_sizes=(64, 32, 16, 128, 8, 4, 2, 1, 256),
            priority=0,
            description="latents in blocks: absorbed for single tokens, expanded for prompts",
        ),
        AttentionBackendSpec(
            name="torch_flash",
            kind="flash",
            chip="any",
            dtypes=_ALL,
            implementation="npu_zoo.nn.attention.contiguous:ContiguousAttention",
            prefix_caching=False,
            priority=0,
            description="one contiguous stretch of keys and values per sequence",
        ),
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
            description="npu_fused_infer_attention_score over one contiguous stretch per sequence",
        ),
    ]


@hookimpl
def register_engines() -> list[EngineSpec]:
    """The native engine."""
    return [
        EngineSpec(
            name="native",
            implementation="npu_zoo.engine.engine:NativeEngine",
            chips=("cpu", "cuda", "ascend910b", "ascend310p"),
            max_world_size=1,
            requires=("torch", "transformers"),
            description="continuous batching over a paged KV cache, in torch",
        )
    ]


@hookimpl
def register_weight_formats() -> list[WeightFormatSpec]:
    """Hugging Face's formats; the pickled one is known, and refused with the command that converts it."""
    return [
        WeightFormatSpec(
            name="hf-safetensors",
            patterns=("*.safetensors",),
            loader="npu_zoo.weights.safetensors:SafetensorsLoader",
            description="safetensors shards, with or without an index",
        ),
        WeightFormatSpec(
            name="hf-bin",
            patterns=("pytorch_model*.bin", "*.pt", "*.pth"),
            loadable=False,
            description="pickled torch checkpoints",
        ),
    ]
