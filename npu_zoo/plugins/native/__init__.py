"""The zoo's own engine, kernels, attention backends and checkpoint formats, registered like anybody's."""

from __future__ import annotations

from npu_zoo.api import (
    AttentionBackendSpec,
    DType,
    EngineSpec,
    KernelSpec,
    QuantizationSpec,
    WeightFormatSpec,
    hookimpl,
)
from npu_zoo.plugins.native.ascend import ASCEND_BACKENDS, ASCEND_KERNELS
from npu_zoo.plugins.native.compiled import COMPILED_BACKENDS, COMPILED_KERNELS
from npu_zoo.plugins.native.quantized import QUANTIZATION_METHODS, QUANTIZED_KERNELS

_ALL: tuple[DType, ...] = ("float32", "bfloat16", "float16")

TORCH_BACKENDS = (
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
)


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
        _reference("top_k_top_p", "top_k_top_p"),
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
        _cpu("top_k_top_p", "cpu:top_k_top_p", "numpy's sort, a row at a time"),
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
        *COMPILED_KERNELS,
        *QUANTIZED_KERNELS,
        *ASCEND_KERNELS,
    ]


@hookimpl
def register_quantization_methods() -> list[QuantizationSpec]:
    """Symmetric integers in the layout of compressed-tensors."""
    return list(QUANTIZATION_METHODS)


@hookimpl
def register_attention_backends() -> list[AttentionBackendSpec]:
    """Attention in plain torch, on any device that torch drives, and by the fused operators of Ascend's chips."""
    return [
        *TORCH_BACKENDS,
        *COMPILED_BACKENDS,
        AttentionBackendSpec(
            name="cpu_paged_int8",
            kind="paged",
            kv_cache_dtype="int8",
            chip="cpu",
            dtypes=_ALL,
            implementation="npu_zoo.nn.attention.int8:Int8PagedAttention",
            block_sizes=(64,),
            description="int8 keys and values in blocks, with a scale per token and head, which decode reads in place",
        ),
        AttentionBackendSpec(
            name="cpu_flash_int8",
            kind="flash",
            kv_cache_dtype="int8",
            chip="cpu",
            dtypes=_ALL,
            implementation="npu_zoo.nn.attention.int8:Int8ContiguousAttention",
            prefix_caching=False,
            description="int8 keys and values in one contiguous stretch per sequence",
        ),
        *ASCEND_BACKENDS,
    ]


@hookimpl
def register_engines() -> list[EngineSpec]:
    """The native engine."""
    return [
        EngineSpec(
            name="native",
            implementation="npu_zoo.engine.engine:NativeEngine",
            chips=("cpu", "cuda", "ascend910b", "ascend310p"),
            requires=("torch", "transformers"),
            description="continuous batching over a paged KV cache, in torch",
        )
    ]


@hookimpl
def register_weight_formats() -> list[WeightFormatSpec]:
    """What is read and written; a directory is of the first format whose files it has."""
    formats = "npu_zoo.weights.formats"
    return [
        WeightFormatSpec(
            name="ascend-mp",
            patterns=("model*-mp*.safetensors",),
            loader="npu_zoo.weights.loader:AscendMpLoader",
            source=f"{formats}.ascend_mp:read_ascend_mp",
            target=f"{formats}.ascend_mp:AscendMpTarget",
            ranks=True,
            description="a safetensors file model{i}-mp{N} for each of N ranks",
        ),
        WeightFormatSpec(
            name="hf-safetensors",
            patterns=("*.safetensors",),
            loader="npu_zoo.weights.safetensors:SafetensorsLoader",
            source=f"{formats}.hf:read_safetensors",
            target=f"{formats}.hf:SafetensorsTarget",
            description="Hugging Face's safetensors files",
        ),
        WeightFormatSpec(
            name="hf-bin",
            patterns=("pytorch_model*.bin",),
            loader="npu_zoo.weights.loader:BinLoader",
            source=f"{formats}.hf:read_bin",
            target=f"{formats}.hf:BinTarget",
            description="Hugging Face's pickled files; no code in them is executed",
        ),
        WeightFormatSpec(
            name="mindspore-ckpt",
            patterns=("*.ckpt", "rank_*/*.ckpt"),
            loader="npu_zoo.weights.loader:MindSporeLoader",
            source=f"{formats}.mindspore:read_mindspore",
            target=f"{formats}.mindspore:MindSporeTarget",
            ranks=True,
            description="MindSpore's checkpoints, one file or a directory for each rank",
        ),
    ]
