"""Kernels against the reference of their operation, on inputs of every operation that the zoo has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npu_zoo.core.errors import UsageError
from npu_zoo.core.hardware import CHIPS
from npu_zoo.core.quantization import scheme_of
from npu_zoo.core.specs import KernelSpec
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.kernels.table import rotary_tables
from npu_zoo.nn.routing import Routing
from npu_zoo.platforms.ascend import chip_of_soc
from npu_zoo.registry import Registry, load_code
from npu_zoo.selection import is_importable, unavailable
from npu_zoo.testing.agreement import largest

ROWS = (1, 2, 33)
TOLERANCE: dict[str, float] = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""By dtype, relative to one and the reference's own value, or to its largest value where products are summed."""

_EIGHT_BITS = 2e-2
"""The least tolerance where activations become codes, which a rounding elsewhere can move by one of 127 steps."""

_HIDDEN, _WIDTH, _EXPERTS, _TOP_K = 64, 96, 12, 3


@dataclass(frozen=True)
class Trial:
    """Inputs that are the same values whatever they are computed in.

    Attributes:
        stored: the dtype that the values are rounded to.
        computed: the dtype that they are given in, the same or a wider one.
        bits: of a quantized weight's codes.
    """

    rows: int
    stored: torch.dtype
    computed: torch.dtype
    device: torch.device
    bits: int = 8

    def noise(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normally distributed values."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
        return drawn.to(self.stored).to(self.device, self.computed)

    def exact(self, *shape: int, seed: int = 0) -> Tensor:
        """Normally distributed values in float32, which some operations take whatever the dtype."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def codes(self, out_features: int, in_features: int, seed: int = 0) -> QuantizedWeight:
        """A quantized weight with a scale per channel, both ends of its range and a channel of zeros."""
        generator, half = torch.Generator().manual_seed(seed), 1 << (self.bits - 1)
        codes = torch.randint(-half, half, (out_features, in_features), dtype=torch.int8, generator=generator)
        codes[0, 0], codes[-1, -1], codes[1] = -half, half - 1, 0
        scale = torch.rand(out_features, 1, generator=generator) / half + 1e-3
        scale = scale.to(self.stored).float()
        return QuantizedWeight(codes.to(self.device), scale.to(self.device), self.bits, self.computed)


Run = Callable[[Any, Trial], tuple[Tensor, ...]]
"""Calls an implementation of an operation on a trial's inputs."""


def _rms_norm(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    return (kernel(trial.noise(trial.rows, _HIDDEN), trial.noise(_HIDDEN, seed=1), 1e-6),)


def _add_rms_norm(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    x, residual = trial.noise(trial.rows, _HIDDEN), trial.noise(trial.rows, _HIDDEN, seed=2)
    return tuple(kernel(x, residual, trial.noise(_HIDDEN, seed=1), 1e-6))


def _tables(kernel: Any, trial: Trial) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(trial.rows).float(), 1.0 / 10 ** torch.linspace(0, 3, 8))
    tables = (angles.cos().to(trial.stored), angles.sin().to(trial.stored))
    return rotary_tables(kernel, *(table.to(trial.device, trial.computed) for table in tables))


def _rotary(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    # Queries and keys come as parts of one projection, and so are not contiguous.
    query, key, _ = torch.split(trial.noise(trial.rows, 4 + 2 + 2, 16), [4, 2, 2], dim=1)
    return tuple(kernel(query, key, *_tables(kernel, trial)))


def _interleaved(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    return (kernel(trial.noise(trial.rows, 4, 16), *_tables(kernel, trial)),)


def _head_linear(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    return (kernel(trial.noise(trial.rows, 3, 16), trial.noise(3, 16, 24, seed=1, scale=0.25)),)


def _silu_and_mul(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    return (kernel(trial.noise(trial.rows, 2 * _HIDDEN)),)


def _linear(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    weight = trial.noise(_WIDTH, _HIDDEN, seed=1, scale=_HIDDEN**-0.5)
    return (kernel.apply(trial.noise(trial.rows, _HIDDEN), kernel.pack(weight)),)


def _quantized_linear(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    return (kernel.apply(trial.noise(trial.rows, _HIDDEN), kernel.pack(trial.codes(_WIDTH, _HIDDEN, seed=1))),)


_ROUTINGS = (
    Routing(top_k=_TOP_K),
    Routing(top_k=_TOP_K, method="group_limited_greedy", n_group=4, topk_group=2, scaling_factor=4.0),
    Routing(_TOP_K, "sigmoid", "noaux_tc", 4, 2, True, 2.5),
)


def _route_tokens(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    logits, bias = trial.exact(trial.rows, _EXPERTS), trial.exact(_EXPERTS, seed=1) * 0.1
    found: list[Tensor] = []
    for routing in _ROUTINGS:
        weights, ids = kernel(logits, bias if routing.has_bias else None, routing)
        order = ids.argsort(-1)  # which of a token's experts comes first does not matter
        found += [weights.gather(1, order), ids.gather(1, order)]
    return tuple(found)


def _chosen(trial: Trial) -> tuple[Tensor, Tensor]:
    weights, ids = trial.exact(trial.rows, _EXPERTS, seed=1).softmax(-1).topk(_TOP_K)
    return ids, weights


def _experts(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    linear = reference.Linear
    gate_up = [linear.pack(trial.noise(2 * 32, _HIDDEN, seed=10 + n, scale=_HIDDEN**-0.5)) for n in range(_EXPERTS)]
    down = [linear.pack(trial.noise(_HIDDEN, 32, seed=100 + n, scale=32**-0.5)) for n in range(_EXPERTS)]
    return _feed_forward(kernel, trial, gate_up, down, linear)


def _quantized_experts(kernel: Any, trial: Trial, linear: Any) -> tuple[Tensor, ...]:
    gate_up = [linear.pack(trial.codes(2 * 32, _HIDDEN, seed=10 + n)) for n in range(_EXPERTS)]
    down = [linear.pack(trial.codes(_HIDDEN, 32, seed=100 + n)) for n in range(_EXPERTS)]
    return _feed_forward(kernel, trial, gate_up, down, linear)


def _feed_forward(kernel: Any, trial: Trial, gate_up: Any, down: Any, linear: Any) -> tuple[Tensor, ...]:
    stack = getattr(kernel, "stack", list)
    ids, weights = _chosen(trial)
    x = trial.noise(trial.rows, _HIDDEN)
    first, second = stack(gate_up), stack(down)
    uneven = torch.arange(_TOP_K, device=trial.device).expand_as(ids).contiguous()  # every token to the same experts
    return tuple(kernel(x, to, weights, first, second, linear, reference.silu_and_mul) for to in (ids, uneven))


def _top_k_top_p(kernel: Any, trial: Trial) -> tuple[Tensor, ...]:
    logits = trial.exact(trial.rows, 200) * 3
    rows = range(trial.rows)
    return (kernel(logits, [(0, 5, 200)[row % 3] for row in rows], [(1.0, 0.5, 0.9, 0.0)[row % 4] for row in rows]),)


RUNS: Mapping[str, Run] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary_embedding": _rotary,
    "interleaved_rotary_embedding": _interleaved,
    "head_linear": _head_linear,
    "silu_and_mul": _silu_and_mul,
    "linear": _linear,
    "route_tokens": _route_tokens,
    "experts": _experts,
    "top_k_top_p": _top_k_top_p,
}
"""By operation; those of quantized layers go by their kind."""


def device_of(chip: str) -> torch.device | None:
    """Where a chip's kernels run on this machine, real or simulated; None where it has no such device."""
    kind = "cpu" if chip == "any" else CHIPS[chip].device if chip in CHIPS else None
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "cuda":
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.device("npu") if kind == "npu" and chip == _chip_of_npu() else None


@functools.cache
def _chip_of_npu() -> str | None:
    """The chip of this process's NPU, real or simulated; None where it has none."""
    if not is_importable("torch_npu"):
        return None
    try:
        import torch_npu
    except (ImportError, RuntimeError):  # it is installed without CANN
        return None
    available = torch_npu.npu.is_available()
    return chip_of_soc(torch_npu.npu.get_device_name(0)).name if available else None


def runnable_kernels(kernels: Mapping[str, KernelSpec]) -> Iterator[tuple[KernelSpec, str]]:
    """Kernels that run on this machine, with each of their dtypes."""
    for spec in kernels.values():
        if not unavailable(spec) and device_of(spec.chip) is not None:
            yield from ((spec, dtype) for dtype in spec.dtypes)


def tolerance(spec: KernelSpec, dtype: str) -> float:
    """What a kernel's results may differ by; see :func:`largest_error`."""
    return max(TOLERANCE[dtype], _EIGHT_BITS if (scheme_of(spec.operation) or "").endswith("a8") else 0.0)


def largest_error(spec: KernelSpec, dtype: str, registry: Registry) -> float:
    """The largest difference of a kernel's results from its reference's, which computes in float32.

    Relative to one and the reference's value, or to its largest value for products with quantized weights.

    Raises:
        UsageError: nothing is registered as the operation's reference, or nobody says what its inputs are.
        AssertionError: a result has another dtype or shape, or whole numbers differ.
    """
    kernel = load_code(spec.implementation)
    oracle_spec = reference_of_operation(spec.operation, registry)
    oracle = load_code(oracle_spec.implementation)
    device, stored = device_of(spec.chip) or torch.device("cpu"), getattr(torch, dtype)
    scheme = scheme_of(spec.operation)
    bits = registry.quantization_methods[scheme].weight_bits if scheme in registry.quantization_methods else 8
    worst = 0.0
    for rows in ROWS:
        trial = Trial(rows, stored, stored, device, bits)
        due_trial = Trial(rows, stored, torch.float32, torch.device("cpu"), bits)
        with torch.inference_mode():
            found = _run(spec, oracle_spec, registry)(kernel, trial)
            due = _run(spec, oracle_spec, registry)(oracle, due_trial)
        for one, other in zip(found, due, strict=True):
            worst = largest(
                [worst, _error(one.cpu(), other, spec.operation, stored, relative_to_largest=scheme is not None)]
            )
    return worst


def reference_of_operation(operation: str, registry: Registry) -> KernelSpec:
    """The kernel that others of an operation are tested against: that of any chip with the lowest priority.

    Raises:
        UsageError: there is none.
    """
    plain = [k for k in registry.kernels.values() if k.operation == operation and k.chip == "any"]
    if not plain:
        raise UsageError(
            f"operation {operation} has no reference; register a kernel for the chip 'any' with priority 0"
        )
    return min(plain, key=lambda k: k.priority)


def _run(spec: KernelSpec, oracle: KernelSpec, registry: Registry) -> Run:
    scheme = scheme_of(spec.operation)
    multiplies = spec.operation == f"linear_{scheme}"
    if oracle.inputs:
        inputs = load_code(oracle.inputs)
        return lambda kernel, trial: _own(kernel, inputs, trial, multiplies=multiplies)
    if scheme in registry.quantization_methods:
        if multiplies:
            return _quantized_linear
        linear = load_code(reference_of_operation(f"linear_{scheme}", registry).implementation)
        return lambda kernel, trial: _quantized_experts(kernel, trial, linear)
    if spec.operation in RUNS:
        return RUNS[spec.operation]
    raise UsageError(
        f"nobody says what {spec.operation} is tested with; name a function in KernelSpec.inputs of {oracle.name}"
    )


def _own(kernel: Any, inputs: Any, trial: Trial, *, multiplies: bool) -> tuple[Tensor, ...]:
    given = [_given(value, trial) for value in inputs(trial.rows, trial.stored, 0)]
    if multiplies:
        x, weight = given
        return (kernel.apply(x, kernel.pack(weight)),)
    result = kernel(*given)
    return result if isinstance(result, tuple) else (result,)


def _given(value: Any, trial: Trial) -> Any:
    """An input as a trial computes it, on its device."""
    if isinstance(value, QuantizedWeight):
        codes, scale = value.codes.to(trial.device), value.scale.to(trial.device)
        return replace(value, codes=codes, scale=scale, dtype=trial.computed)
    if not isinstance(value, Tensor):
        return value
    return value.to(trial.device, trial.computed if value.dtype == trial.stored else value.dtype)


def _error(found: Tensor, due: Tensor, operation: str, stored: torch.dtype, *, relative_to_largest: bool) -> float:
    if found.shape != due.shape:
        raise AssertionError(f"{operation} gives {list(found.shape)}, and the reference {list(due.shape)}")
    if not due.is_floating_point():
        if not torch.equal(found.long(), due.long()):
            raise AssertionError(f"{operation} gives other whole numbers than the reference")
        return 0.0
    if found.dtype not in (stored, torch.float32):
        raise AssertionError(f"{operation} gives {found.dtype} for {stored}")
    if not torch.equal(found.isfinite(), due.isfinite()):
        raise AssertionError(f"{operation} is finite where the reference is not, or the reverse")
    finite = due.isfinite()
    difference = (found.float() - due.float())[finite].abs()
    scale = due[finite].abs().max().clamp(min=1e-6) if relative_to_largest else 1 + due[finite].abs()
    return float((difference / scale).max()) if difference.numel() else 0.0
