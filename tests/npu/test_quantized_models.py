"""Quantized checkpoints on the simulated device, against the plain ones that they stand for on the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.parallel import Split
from npu_zoo.nn.kernels import ascend_quantized, reference
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.kernels.table import apply_parts
from npu_zoo.registry import get_registry
from npu_zoo.simulator import measure
from npu_zoo.testing.agreement import agree
from npu_zoo.testing.quantized import quantize_checkpoint
from npu_zoo.testing.shapes import rank_shape, write_random_model

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a16": {"bits": 8},
    "w4a16": {"bits": 4},
    "w4a16-groups": {"bits": 4, "group_size": 32},
    "w8a8": {"bits": 8, "activations": 8},
}
BOUND = {"float16": 0.06, "bfloat16": 0.5}
"""Natural-log probability, as for plain weights."""

INT8_BOUND = {"float16": 0.3, "bfloat16": 0.9}
"""Where activations become codes, a rounding elsewhere can move one of 127 steps; twice and more what was seen."""

PROMPTS = [list(range(3, 3 + length)) for length in (40, 17, 1)]


SHARES = {
    "deepseek_coder": ("6.7b", Split(4)),
    "deepseek_moe": ("16b", Split(4)),
    "deepseek_v3": ("v2-lite", Split(4)),
}
"""A variant of each family and how many ranks share it: small models with one rank's heads are run."""


def write_source(family: str, directory: Path) -> Path:
    name, split = SHARES[family]
    spec = get_registry().families[family]
    variant = spec.variant(name)
    assert variant is not None
    assert variant.config is not None
    return write_random_model(directory, spec, rank_shape(variant.config, split))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """A family's random model in a scheme, and the plain checkpoint that it stands for."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family: str, scheme: str) -> tuple[Path, Path]:
        if (family, scheme) not in made:
            target = tmp_path_factory.mktemp("quantized")
            made[family, scheme] = quantize_checkpoint(write_source(family, target), target, **SCHEMES[scheme])
        return made[family, scheme]

    return make


def launch(family: str, weights: Path, hardware: str, dtype: str, **options: Any) -> LLM:
    shared: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory": "32MiB", "allow_experimental": True}
    strict = hardware != "cpu"
    shared |= {"strict_kernels": strict, "skip_tokenizer_init": True}
    return LLM(f"{family}:custom", weights=str(weights), hardware=hardware, dtype=dtype, **{**shared, **options})


FAMILIES = ["deepseek_coder"] if DUO else ["deepseek_coder", "deepseek_moe", "deepseek_v3"]
CASES = [
    pytest.param(family, scheme, dtype, id=f"{family}-{scheme}-{dtype}")
    for family in FAMILIES
    for scheme in (["w8a8"] if DUO else SCHEMES)
    for dtype in (["float16"] if DUO else ["float16", "bfloat16"])
]


@pytest.mark.parametrize(("family", "scheme", "dtype"), CASES)
def test_a_quantized_model(family: str, scheme: str, dtype: str, checkpoints: Any) -> None:
    """Weights alone equal their dequantized form; int8 activations equal the CPU's own."""
    quantized, plain = checkpoints(family, scheme)
    bound = (INT8_BOUND if scheme == "w8a8" else BOUND)[dtype]
    reference = launch(family, quantized if scheme == "w8a8" else plain, "cpu", dtype)
    llm = launch(family, quantized, PRODUCT, dtype)
    assert agree(reference, llm, PROMPTS).within(bound)
    chunked = launch(family, quantized, PRODUCT, dtype, max_num_batched_tokens=16, max_num_seqs=4)
    assert agree(reference, chunked, PROMPTS).within(bound)


@pytest.mark.parametrize("scheme", ["w8a8"] if DUO else list(SCHEMES))
def test_graphs_equal_launching_one_by_one(scheme: str, checkpoints: Any) -> None:
    family = "deepseek_coder" if DUO else "deepseek_moe"
    quantized, _ = checkpoints(family, scheme)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    graphs, eager = (launch(family, quantized, PRODUCT, "float16", enforce_eager=eager) for eager in (False, True))
    # One sequence, so that no padding of a captured batch changes the order in which a product is summed.
    outputs = [llm.generate(PROMPTS[:1], params)[0].outputs[0] for llm in (graphs, eager)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].cumulative_logprob == outputs[1].cumulative_logprob
    with measure() as report:
        graphs.generate(PROMPTS[:1], params)
    assert report.replays == 7  # all but the prompt's step


def quantized(rows: int, width: int, bits: int, group_size: int | None, dtype: torch.dtype, seed: int = 0) -> Any:
    """A weight with a channel of zeros, on the device, and the same on the CPU."""
    generator, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, width), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, width // (group_size or width), generator=generator) / half
    codes[3] = 0
    scale = scale.to(dtype).float()
    return QuantizedWeight(codes.npu(), scale.npu(), bits, dtype), QuantizedWeight(codes, scale, bits, dtype)


TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative to the largest result: both sides round once or twice."""

WEIGHTS: list[tuple[str, int, int | None]] = [("w8a8", 8, None)]
if not DUO:
    WEIGHTS += [(f"w{bits}a16", bits, group) for bits in (8, 4) for group in (None, 32, 64, 128)]


def near(found: torch.Tensor, due: torch.Tensor) -> bool:
    error = (found.cpu().float() - due.float()).abs().max() / due.float().abs().max()
    return found.dtype is due.dtype and float(error) < TOLERANCE[due.dtype]


def kernels_of(scheme: str) -> tuple[Any, Any]:
    oracle = reference.Int8Linear if scheme == "w8a8" else reference.DequantizedLinear
    chosen = ascend_quantized.fractal_linear_w8a8 if DUO else getattr(ascend_quantized, f"linear_{scheme}")
    return chosen, oracle


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float16] if DUO else list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("scheme", "bits", "group_size"), WEIGHTS)
def test_linear(scheme: str, bits: int, group_size: int | None, dtype: torch.dtype, rows: int) -> None:
    kernel, oracle = kernels_of(scheme)
    on_device, on_cpu = quantized(48, 256, bits, group_size, dtype)
    x = torch.randn(rows, 256).to(dtype)
    packed, due = kernel.pack(on_device), oracle.apply(x, oracle.pack(on_cpu))
    assert near(kernel.apply(x.npu(), packed), due)
    parts = apply_parts(kernel, x.npu(), packed, (32, 8, 8))
    assert all(near(part, one) for part, one in zip(parts, due.split((32, 8, 8), -1), strict=True))
    assert DUO or all(part.is_contiguous() for part in parts)


EXPERTS = [weights for weights in WEIGHTS if weights[0] != "w8a16" or weights[2] is None]


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("scheme", "bits", "group_size"), EXPERTS)
def test_experts(scheme: str, bits: int, group_size: int | None, dtype: torch.dtype, rows: int) -> None:
    (linear, oracle), kernel = kernels_of(scheme), getattr(ascend_quantized, f"experts_{scheme}")
    shapes = [(2 * 256, 192), (192, 256)]
    group_size = group_size and min(group_size, 64)  # which divides both widths
    pairs = [[quantized(*shape, bits, group_size, dtype, seed=10 * expert) for expert in range(4)] for shape in shapes]
    x, weights = torch.randn(rows, 192).to(dtype), torch.rand(rows, 2)
    ids = torch.rand(rows, 4).argsort(-1)[:, :2]

    def silu_and_mul(hidden: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(hidden)

    plain = [[oracle.pack(on_cpu) for _, on_cpu in layer] for layer in pairs]
    due = reference.experts(x, ids, weights, *plain, oracle, silu_and_mul)
    stacked = [kernel.stack([linear.pack(on_device) for on_device, _ in layer]) for layer in pairs]
    found = kernel(x.npu(), ids.npu(), weights.npu(), *stacked, linear, silu_and_mul)
    error = (found.cpu().float() - due.float()).abs().max() / due.float().abs().max()
    assert float(error) < 4 * TOLERANCE[dtype]


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("linear_w8a16", (64, 96, 48), "groups of 48 inputs; npu_weight_quant_batchmatmul takes multiples of 32"),
        ("linear_w4a16", (64, 96, 96), "below the 96 inputs"),
        ("linear_w4a16", (64, 100, None), "takes rows of a multiple of 8 codes, and these have 100"),
        ("linear_w8a8", (70_000, 64, None), "sizes up to 65535"),
        ("experts_w8a16", (64, 96, 32), "takes int8 experts with one scale per output channel alone"),
        ("experts_w4a16", (36, 96, 32), "takes multiples of 8 in w4a16"),
    ],
)
def test_shapes_that_no_operator_takes(name: str, shape: tuple[int, int, int | None], named: str) -> None:
    with pytest.raises(HardwareError, match=re.escape(named)):
        getattr(ascend_quantized, name).require(*shape)


@pytest.mark.chip("ascend910b")
def test_a_refused_group_size_names_the_layer(tmp_path: Path) -> None:
    source = write_source("deepseek_moe", tmp_path / "source")
    quantized, _ = quantize_checkpoint(source, tmp_path, bits=8, group_size=16)
    with pytest.raises(HardwareError, match=r"q_proj/k_proj/v_proj of .* in w8a16: groups of 16 inputs"):
        launch("deepseek_moe", quantized, PRODUCT, "float16")
