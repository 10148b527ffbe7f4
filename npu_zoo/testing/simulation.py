"""Runs what a matrix row claims on a simulated product, against the CPU, and makes evidence of it.

A row of one device is simulated when every combination that it offers was: hardware, dtype and attention. Each is run
in several ways, since chunks, shared prefixes, batches and graphs take other paths through the same kernels. A row of
several devices is run with the fewest that are more than one, in each of its layouts; its record says which.
"""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import npu_zoo
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import FeatureRow, layout_names, splits_of
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.request import bundled_directory
from npu_zoo.testing.agreement import Agreement, agree
from npu_zoo.testing.shapes import rank_shape, write_random_model

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

BOUNDS: dict[str, float] = {"float16": 0.06, "bfloat16": 0.5}
"""Natural-log probability by dtype, for models of a few layers; twice and more what was seen."""

_PROMPTS = tuple(tuple(range(3, 3 + length)) for length in (40, 17, 1))
_WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "without graphs": {"enforce_eager": True},
}


_ONE_WAY: dict[str, Any] = _WAYS["in chunks"]
"""Of ranks: it takes prompts in chunks and single tokens from graphs."""

_MOST_DEVICES = 4  # eight take as long as all others together
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

    @property
    def split(self) -> Split:
        """How the devices share the model."""
        return splits_of(self.layout, self.devices)[0]

    @property
    def name(self) -> str:
        """Of its figures."""
        shared = (layout_names(self.split)[0],) if self.devices > 1 else ()
        return "_".join((self.hardware, self.dtype, self.attention, *shared))


@dataclass(frozen=True)
class CellResult:
    """How a cell's runs agree with the CPU's in the same dtype; the worst of all ways."""

    cell: Cell
    agreement: Agreement

    @property
    def passes(self) -> bool:
        """Whether it is within the bound of its dtype."""
        return self.agreement.within(BOUNDS[self.cell.dtype])


def cells_of(row: FeatureRow) -> list[Cell]:
    """What a row offers on NPUs, in plain weights; empty where it takes more devices than can be simulated."""
    plain = row.quantization == ("none",) and row.kv_cache_dtype == ("auto",)
    if not plain or not all(name.startswith("atlas") for name in row.hardware):
        return []
    devices = min((size for size in row.world_size if size > 1), default=1)
    if devices > _MOST_DEVICES or not all(splits_of(layout, devices) for layout in row.parallelism):
        return []
    values = itertools.product(row.hardware, row.dtype, row.attention, row.parallelism)
    return [Cell(*value, devices) for value in values]


def variant_of(family: FamilySpec, row: FeatureRow) -> VariantSpec | None:
    """The variant that a row is run with; None where it has no bundled checkpoint and no known shape."""
    own = [variant for variant in family.variants if variant.size in row.sizes]
    bundled = [variant for variant in family.variants if variant.bundled]
    shaped = [variant for variant in own if variant.bundled or variant.config]
    return next(iter(shaped or (bundled if "custom" in row.sizes else [])), None)


def run_cell(family: FamilySpec, variant: VariantSpec, cell: Cell) -> CellResult:
    """Run a variant on the CPU and on the cell's product, which this process must simulate.

    The bundled checkpoint is run where the variant has one, else a small random model with the variant's heads.
    """
    if cell.devices == 1:
        return CellResult(cell, _worst(_agreements(family, cell, {"model": f"{family.name}:{variant.name}"})))
    with tempfile.TemporaryDirectory() as folder:
        weights = bundled_directory(variant)
        if weights is None:
            assert variant.config is not None
            weights = write_random_model(Path(folder), family, rank_shape(variant.config, Split()))
        custom = {"model": f"{family.name}:custom", "weights": str(weights), "skip_tokenizer_init": True}
        return CellResult(cell, _worst(_agreements(family, cell, {**custom, "allow_experimental": True})))


def _agreements(family: FamilySpec, cell: Cell, model: Mapping[str, Any]) -> list[Agreement]:
    from npu_zoo.engine.llm import LLM

    shared: dict[str, Any] = {**model, "dtype": cell.dtype, "max_model_len": 256, "kv_cache_memory": "32MiB"}
    split = cell.split
    sizes = dict(zip(_SIZES, (split.tp, split.pp, split.ep, split.dp), strict=True)) if cell.devices > 1 else {}
    on_device: dict[str, Any] = {
        "hardware": cell.hardware,
        "attention": cell.attention,
        "strict_kernels": True,
        **sizes,
    }
    found = []
    with LLM(hardware="cpu", **shared) as reference:
        for options in [_ONE_WAY] if cell.devices > 1 else _WAYS.values():
            with LLM(**on_device, **shared, **options) as llm:
                found += [agree(reference, llm, _PROMPTS), *_alone(reference, llm)]
    return found


def _alone(reference: LLM, llm: LLM) -> list[Agreement]:
    """One prompt by itself, twice: the second time from the prefix cache, where there is one."""
    return [agree(reference, llm, _PROMPTS[:1]) for _ in range(2)]


def _worst(found: Sequence[Agreement]) -> Agreement:
    return Agreement(
        tokens=sum(one.tokens for one in found),
        worst_logprob=max(one.worst_logprob for one in found),
        equal_tokens=sum(one.equal_tokens for one in found),
        worst_gap=max(one.worst_gap for one in found),
        mean_logprob=max(one.mean_logprob for one in found),
    )


def record_of(
    family: FamilySpec,
    row: FeatureRow,
    shape: Mapping[str, int | float | str],
    results: Iterable[CellResult],
    code: str,
) -> EvidenceRecord:
    """The record of a row whose cells have all passed.

    Args:
        shape: what ran.
        code: :func:`npu_zoo.testing.evidence.current_code`.
    """
    figures: dict[str, float] = {}
    results = list(results)
    for result in results:
        name = result.cell.name
        figures[f"{name}_worst_logprob_difference"] = round(result.agreement.worst_logprob, 4)
        figures[f"{name}_tokens"] = result.agreement.tokens
    versions = {name: metadata.version(name) for name in ("torch", "torch_npu")} | {"npu_zoo": npu_zoo.__version__}
    return EvidenceRecord(
        family=family.name,
        row=row_digest(row),
        level="simulated",
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        shape={**shape, "devices": results[0].cell.devices},
        versions=versions,
        figures=figures,
        code=code,
    )
