"""Runs what a matrix row claims on a product, simulated or real, against the CPU, and makes evidence of it.

A row of one device is simulated when every combination that it offers was: hardware, dtype and attention. Each is run
in several ways, since chunks, shared prefixes, batches and graphs take other paths through the same kernels. A row of
several devices is run with the fewest that are more than one, in each of its layouts; its record says which.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import npu_zoo
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import FeatureRow, layout_names, splits_of
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.parallel import Split
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.request import bundled_directory, parse_dtype
from npu_zoo.testing.agreement import Agreement, agree, largest
from npu_zoo.testing.quantized import quantized
from npu_zoo.testing.shapes import rank_shape, write_random_model
from npu_zoo.testing.variants import TINY, with_tiny_variant

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

BOUNDS: dict[str, float] = {"float32": 1e-3, "float16": 0.06, "bfloat16": 0.5}
"""Natural-log probability by dtype, for models of a few layers; twice and more what was seen."""

QUANTIZED_BOUND = 0.25
"""The least bound with quantized weights: a product that rounds elsewhere can choose another expert."""

ROUNDED_BOUND = 1.0
"""The same where activations or keys and values become codes, which a rounding elsewhere can move by a step."""

_MEAN_TO_WORST = 4
"""How far below the bound of a single log-probability their mean difference has to be."""

_PROMPTS = tuple(tuple(range(3, 3 + length)) for length in (40, 17, 1))
_WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "without graphs": {"enforce_eager": True},
}


_ONE_WAY: dict[str, Any] = _WAYS["in chunks"]
"""Of ranks: it takes prompts in chunks and single tokens from graphs."""

MOST_DEVICES = 4  # eight take as long as all others together
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "data_parallel_size")


@dataclass(frozen=True)
class Cell:
    """One combination that a row offers.

    Attributes:
        layout: how ``devices`` share the model, as the row has it.
    """

    hardware: str
    dtype: str
    attention: str
    layout: str = "tp"
    devices: int = 1
    quantization: str = "none"
    kv_cache_dtype: str = "auto"

    @property
    def split(self) -> Split:
        """How the devices share the model."""
        return splits_of(self.layout, self.devices)[0]

    @property
    def name(self) -> str:
        """Of its figures."""
        shared = [layout_names(self.split)[0]] if self.devices > 1 else []
        stored = [] if self.quantization == "none" else [self.quantization]
        stored += [] if self.kv_cache_dtype == "auto" else [f"{self.kv_cache_dtype}_cache"]
        return "_".join((self.hardware, self.dtype, self.attention, *stored, *shared))

    @property
    def bound(self) -> float:
        """What a log-probability may differ by."""
        rounded = self.kv_cache_dtype != "auto" or self.quantization.endswith("a8")
        quantized_bound = QUANTIZED_BOUND if self.quantization != "none" else 0.0
        return max(BOUNDS[self.dtype], ROUNDED_BOUND if rounded else quantized_bound)


@dataclass(frozen=True)
class CellResult:
    """How a cell's runs agree with the CPU's in the same dtype; the worst of all ways."""

    cell: Cell
    agreement: Agreement

    @property
    def passes(self) -> bool:
        """Whether it is within the cell's bound."""
        return self.agreement.within(self.cell.bound) and self.agreement.mean_logprob < self.cell.bound / _MEAN_TO_WORST


def cells_of(row: FeatureRow) -> list[Cell]:
    """What a row offers on NPUs; empty where it takes more devices than can be simulated."""
    devices = min((size for size in row.world_size if size > 1), default=1)
    on_npus = all(chip_of(name).device == "npu" for name in row.hardware)
    if not on_npus or devices > MOST_DEVICES or not all(splits_of(layout, devices) for layout in row.parallelism):
        return []
    axes = (row.hardware, row.dtype, row.attention, row.parallelism, (devices,), row.quantization, row.kv_cache_dtype)
    return [Cell(*values) for values in itertools.product(*axes)]


def measured_cells(row: FeatureRow, product: str, devices: int) -> list[Cell]:
    """What a row offers on a product with so many devices, at each of its world sizes."""
    if product not in row.hardware:
        return []
    sizes = [size for size in row.world_size if size <= devices]
    axes = (row.dtype, row.attention, row.parallelism, sizes, row.quantization, row.kv_cache_dtype)
    cells = [Cell(product, *values) for values in itertools.product(*axes)]
    return [cell for cell in cells if splits_of(cell.layout, cell.devices)]


def variant_of(family: FamilySpec, row: FeatureRow) -> VariantSpec | None:
    """The variant that a row is run with; None where the family names no hyperparameters at all."""
    own = [variant for variant in family.variants if variant.size in row.sizes]
    bundled = [variant for variant in family.variants if variant.bundled]
    shaped = [variant for variant in (*own, *bundled, *family.variants) if variant.bundled or variant.config]
    return next(iter(shaped), None)


def run_cell(family: FamilySpec, variant: VariantSpec, cell: Cell) -> CellResult:
    """Run a variant on the CPU and on the cell's product, which this process must have or simulate.

    The bundled checkpoint is run where the variant has one, else a small random model with the variant's heads.
    """
    with _prepared(family, variant, cell) as model:
        return CellResult(cell, _worst(_agreements(cell, model)))


def decode_rate(family: FamilySpec, variant: VariantSpec, cell: Cell) -> float:
    """Tokens per second after the first, of one sequence on the cell's product; the same model as :func:`run_cell`."""
    from npu_zoo.engine.llm import LLM

    tokens = 32
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with _prepared(family, variant, cell) as model, LLM(**_on_device(cell), **_shared(cell, model)) as llm:
        prompt = list(_PROMPTS[0])
        llm.generate([prompt], params)  # captures graphs
        metrics = llm.generate([prompt], params)[0].metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    return (tokens - 1) / (metrics.finished_time - metrics.first_token_time)


@contextlib.contextmanager
def _prepared(family: FamilySpec, variant: VariantSpec, cell: Cell) -> Iterator[dict[str, Any]]:
    """What names a cell's model to an engine, in a registry that offers it."""
    offered = FeatureRow(
        sizes=(TINY,),
        hardware=("cpu", cell.hardware),
        dtype=(parse_dtype(cell.dtype),),
        world_size=(1, cell.devices),
        parallelism=("tp", cell.layout),
        replicated_kv_heads=True,
        attention=("paged", "flash"),
        quantization=(cell.quantization,),
        kv_cache_dtype=("auto", cell.kv_cache_dtype),
        source="zoo",
    )
    with tempfile.TemporaryDirectory() as folder, with_tiny_variant(family, [offered]):
        weights = bundled_directory(variant)
        if weights is None:
            assert variant.config is not None
            weights = write_random_model(Path(folder) / "plain", family, rank_shape(variant.config, Split()))
        weights = quantized(weights, Path(folder) / "quantized", cell.quantization)
        yield {"model": f"{family.name}:{TINY}", "weights": str(weights), "skip_tokenizer_init": True}


def _agreements(cell: Cell, model: Mapping[str, Any]) -> list[Agreement]:
    from npu_zoo.engine.llm import LLM

    shared, on_device = _shared(cell, model), _on_device(cell)
    found = []
    with LLM(hardware="cpu", **shared) as reference:
        for options in [_ONE_WAY] if cell.devices > 1 else _WAYS.values():
            with LLM(**on_device, **shared, **options) as llm:
                found += [agree(reference, llm, _PROMPTS), *_alone(reference, llm)]
    return found


def _shared(cell: Cell, model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, "dtype": cell.dtype, "max_model_len": 256, "kv_cache_memory": "32MiB"}


def _on_device(cell: Cell) -> dict[str, Any]:
    split = cell.split
    sizes = dict(zip(_SIZES, (split.tp, split.pp, split.ep, split.dp), strict=True)) if cell.devices > 1 else {}
    return {
        "hardware": cell.hardware,
        "attention": cell.attention,
        "kv_cache_dtype": cell.kv_cache_dtype,
        "strict_kernels": True,
        **sizes,
    }


def _alone(reference: LLM, llm: LLM) -> list[Agreement]:
    """One prompt by itself, twice: the second time from the prefix cache, where there is one."""
    return [agree(reference, llm, _PROMPTS[:1]) for _ in range(2)]


def _worst(found: Sequence[Agreement]) -> Agreement:
    return Agreement(
        tokens=sum(one.tokens for one in found),
        worst_logprob=largest(one.worst_logprob for one in found),
        equal_tokens=sum(one.equal_tokens for one in found),
        worst_gap=largest(one.worst_gap for one in found),
        mean_logprob=largest(one.mean_logprob for one in found),
    )


def record_of(
    family: FamilySpec,
    row: FeatureRow,
    shape: Mapping[str, int | float | str],
    cells: Mapping[str, Mapping[str, float]],
    code: str,
    *,
    level: Literal["simulated", "measured"] = "simulated",
    versions: Mapping[str, str] | None = None,
) -> EvidenceRecord:
    """The record of a row all of whose cells have passed.

    Args:
        shape: what ran, and on how many ``devices``.
        cells: the figures of each cell, by its name.
        code: :func:`npu_zoo.testing.evidence.current_code`.
        versions: of the hardware and its software, where they took part.
    """
    figures = {f"{cell}_{name}": value for cell, found in cells.items() for name, value in found.items()}
    installed = {name: version for name in ("torch", "torch_npu") if (version := installed_version(name))}
    return EvidenceRecord(
        family=family.name,
        row=row_digest(row),
        level=level,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        shape=dict(shape),
        versions={**installed, "npu_zoo": npu_zoo.__version__, **(versions or {})},
        figures=figures,
        code=code,
    )


def installed_version(name: str) -> str:
    """The version of an installed distribution; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
