"""Runs what a matrix row claims on a simulated product, against the CPU, and makes evidence of it.

A row is simulated when every combination that it offers was: hardware, dtype and attention, on one device each. Each is
run in several ways, since chunks, shared prefixes, batches and graphs take other paths through the same kernels.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import npu_zoo
from npu_zoo.core.evidence import EvidenceRecord, code_digest, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.testing.agreement import Agreement, agree

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


@dataclass(frozen=True)
class Cell:
    """One combination that a row offers, on one device."""

    hardware: str
    dtype: str
    attention: str


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
    """What a row offers on one NPU; empty where the row takes anything else."""
    alone = row.world_size == (1,) and row.quantization == ("none",) and row.kv_cache_dtype == ("auto",)
    if not alone or not all(name.startswith("atlas") for name in row.hardware):
        return []
    return [Cell(*values) for values in itertools.product(row.hardware, row.dtype, row.attention)]


def run_cell(family: FamilySpec, variant: VariantSpec, cell: Cell) -> CellResult:
    """Run a variant's bundled checkpoint on the CPU and on the cell's product, which this process must simulate."""
    from npu_zoo.engine.llm import LLM

    shared: dict[str, Any] = {
        "model": f"{family.name}:{variant.name}",
        "dtype": cell.dtype,
        "max_model_len": 256,
        "kv_cache_memory": "32MiB",
    }
    reference = LLM(hardware="cpu", **shared)
    found = []
    for options in _WAYS.values():
        llm = LLM(hardware=cell.hardware, attention=cell.attention, strict_kernels=True, **shared, **options)
        found += [agree(reference, llm, _PROMPTS), *_alone(reference, llm)]
        llm.shutdown()
    reference.shutdown()
    return CellResult(cell, _worst(found))


def _alone(reference: LLM, llm: LLM) -> list[Agreement]:
    """One prompt by itself, twice: the second time from the prefix cache, where there is one."""
    return [agree(reference, llm, _PROMPTS[:1]) for _ in range(2)]


def _worst(found: Sequence[Agreement]) -> Agreement:
    return Agreement(
        tokens=sum(one.tokens for one in found),
        worst_logprob=max(one.worst_logprob for one in found),
        equal_tokens=sum(one.equal_tokens for one in found),
        worst_gap=max(one.worst_gap for one in found),
    )


def evidence_files(plugin: Path) -> list[Path]:
    """The Python files that a family's evidence rests on: its plugin's, the engine's, the layers' and the kernels'."""
    package = Path(npu_zoo.__file__).parent
    rooms = [plugin, package / "engine", package / "nn", package / "plugins" / "native"]
    return [*(file for room in rooms for file in room.rglob("*.py")), package / "core" / "attention.py"]


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
        code: :func:`npu_zoo.core.evidence.code_digest` of :func:`evidence_files`.
    """
    figures: dict[str, float] = {}
    for result in results:
        name = "_".join(asdict(result.cell).values())
        figures[f"{name}_worst_logprob_difference"] = round(result.agreement.worst_logprob, 4)
        figures[f"{name}_tokens"] = result.agreement.tokens
    versions = {name: metadata.version(name) for name in ("torch", "torch_npu")} | {"npu_zoo": npu_zoo.__version__}
    return EvidenceRecord(
        family=family.name,
        row=row_digest(row),
        level="simulated",
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        shape={**shape, "devices": 1},
        versions=versions,
        figures=figures,
        code=code,
    )


def stale_records(family: FamilySpec, plugin: Path) -> list[EvidenceRecord]:
    """Records that speak of other code than that at hand, or of a row that the family no longer has."""
    code, rows = code_digest(evidence_files(plugin)), {row_digest(row) for row in family.rows}
    return [record for record in family.records if record.code != code or record.row not in rows]
