"""What the zoo registers for quantized weights: how they are stored, and what multiplies with them."""

from __future__ import annotations

from npu_zoo.api import DType, KernelSpec, QuantizationSpec

_ALL: tuple[DType, ...] = ("float32", "bfloat16", "float16")
_HALVES: tuple[DType, ...] = ("bfloat16", "float16")

_REFERENCES = {"w8a16": "DequantizedLinear", "w4a16": "DequantizedLinear", "w8a8": "Int8Linear"}
_OWN_ON_CPU: dict[str, tuple[str, tuple[DType, ...], str]] = {
    "w8a16": ("WeightOnlyInt8Linear", ("bfloat16",), "torch's int8 product, in dequantized blocks for many rows"),
    "w4a16": ("WeightOnlyInt4Linear", ("bfloat16",), "torch's int4 product, in dequantized blocks for many rows"),
    "w8a8": ("DynamicInt8Linear", _ALL, "oneDNN's int8 product, activations quantized by token"),
}


def _kernel(operation: str, chip: str, implementation: str, description: str, **more: object) -> KernelSpec:
    owner = "reference" if chip == "any" else chip
    values = {"name": f"{owner}_{operation}", "dtypes": _ALL, "description": description} | more
    return KernelSpec(operation=operation, chip=chip, implementation=f"npu_zoo.nn.kernels.{implementation}", **values)  # type: ignore[arg-type]


def _reference_kernels(scheme: str) -> list[KernelSpec]:
    linear, told = f"reference:{_REFERENCES[scheme]}", "plain torch, the oracle of every other kernel"
    return [
        _kernel(f"linear_{scheme}", "any", linear, told, priority=0),
        _kernel(f"experts_{scheme}", "any", "reference:experts", told, priority=0),
    ]


def _cpu_kernels(scheme: str) -> list[KernelSpec]:
    implementation, dtypes, told = _OWN_ON_CPU[scheme]
    sorted_rows = "tokens sorted by expert, a quantized product per expert that was hit"
    found = [
        _kernel(f"linear_{scheme}", "cpu", f"cpu_quantized:{implementation}", told, dtypes=dtypes),
        _kernel(f"experts_{scheme}", "cpu", "cpu:experts", sorted_rows),
    ]
    if dtypes != _ALL:
        blocks = _kernel(
            f"linear_{scheme}",
            "cpu",
            f"reference:{_REFERENCES[scheme]}",
            "torch's own operator, on blocks of the weight that are dequantized one by one",
            name=f"cpu_plain_linear_{scheme}",
            priority=5,
        )
        found.append(blocks)
    return found


def _ascend_kernels() -> list[KernelSpec]:
    """The operators for quantized products that each chip has."""
    rows, combine = "npu_moe_init_routing_v2", "npu_moe_token_unpermute"
    operators: dict[str, tuple[str, ...]] = {
        "linear_w8a16": ("npu_weight_quant_batchmatmul", "npu_grouped_matmul"),
        "linear_w4a16": ("npu_convert_weight_to_int4pack", "npu_weight_quant_batchmatmul"),
        "linear_w8a8": ("npu_dynamic_quant", "npu_quant_matmul"),
        "experts_w8a16": (rows, "npu_grouped_matmul", combine),
        "experts_w4a16": (rows, "npu_convert_weight_to_int4pack", "npu_grouped_matmul", combine),
        "experts_w8a8": (rows, "npu_dynamic_quant", "npu_grouped_matmul", combine),
    }
    on_duo = ("npu_dynamic_quant", "npu_quant_matmul", "npu_format_cast")
    return [
        *(
            _ascend(operation, "ascend910b", _HALVES, f"ascend_quantized:{operation}", called)
            for operation, called in operators.items()
        ),
        _ascend("linear_w8a8", "ascend310p", ("float16",), "ascend_quantized:fractal_linear_w8a8", on_duo),
    ]


def _ascend(
    operation: str, chip: str, dtypes: tuple[DType, ...], implementation: str, operators: tuple[str, ...]
) -> KernelSpec:
    told = ", ".join(operators)
    return _kernel(operation, chip, implementation, told, dtypes=dtypes, requires=("torch_npu",), operators=operators)


QUANTIZED_KERNELS = (
    *(kernel for scheme in _REFERENCES for kernel in _reference_kernels(scheme)),
    *(kernel for scheme in _REFERENCES for kernel in _cpu_kernels(scheme)),
)

ASCEND_QUANTIZED = _ascend_kernels()


def _method(name: str, weights: int, activations: int, attribute: str, description: str) -> QuantizationSpec:
    return QuantizationSpec(
        name=name,
        weight_bits=weights,
        activation_bits=activations,
        chips=("any",),
        method=f"npu_zoo.nn.quantization:{attribute}",
        description=description,
    )


QUANTIZATION_METHODS = (
    _method("w8a16", 8, 16, "PackedWeights", "int8 weights by channel or group, activations in the compute dtype"),
    _method("w4a16", 4, 16, "PackedWeights", "int4 weights by channel or group, activations in the compute dtype"),
    _method("w8a8", 8, 8, "Int8Weights", "int8 weights by channel, activations int8 with a scale per token"),
)
