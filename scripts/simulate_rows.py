"""Run every matrix row that up to four simulated devices can run, and write the families' evidence.json.

    .venv-npu/bin/python scripts/simulate_rows.py            # all products, a process for each and each family
    .venv-npu/bin/python scripts/simulate_rows.py --check    # writes nothing; fails where the committed records differ

A row's record is written when all of its cells are within their bounds; its figures are the worst differences seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import npu_zoo
from npu_zoo.checkpoint import read_config
from npu_zoo.core.evidence import EvidenceRecord, code_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory
from npu_zoo.testing.agreement import Agreement
from npu_zoo.testing.shapes import rank_shape
from npu_zoo.testing.simulation import Cell, CellResult, cells_of, evidence_files, record_of, run_cell, variant_of

PLUGINS = Path(__file__).parent.parent / "npu_zoo" / "plugins"
_AT_ONCE = 4
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HCCL_IF_BASE_PORT": "61000",  # the default ones are among those that any process is given
}
_SHOWN = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def rows() -> list[tuple[FamilySpec, VariantSpec, FeatureRow]]:
    """The rows that simulated devices can run, each with the variant that runs it."""
    found = [
        (family, variant_of(family, row), row)
        for family in get_registry().families.values()
        for row in family.rows
        if cells_of(row)
    ]
    return [(family, variant, row) for family, variant, row in found if variant is not None]


def run_share(product: str, name: str) -> list[dict[str, object]]:
    """The results of a family's cells of one product, which this process simulates."""
    npu_zoo.simulate()
    found = []
    for family, variant, cell in cells():
        if cell.hardware == product and family.name == name:
            result = run_cell(family, variant, cell)
            print(f"{family.name}:{variant.name}: {result}", file=sys.stderr, flush=True)
            found.append({"family": family.name, "variant": variant.name, **asdict(result)})
    return found


def cells() -> list[tuple[FamilySpec, VariantSpec, Cell]]:
    """All cells, those first that take most devices; rows may have some in common."""
    found = {
        (family.name, variant.name, cell): (family, variant, cell)
        for family, variant, row in rows()
        for cell in cells_of(row)
    }
    return sorted(found.values(), key=lambda entry: -entry[2].devices)


def run_all() -> dict[tuple[str, str, Cell], CellResult]:
    """The results of all products."""
    shares = list(dict.fromkeys((cell.hardware, family.name) for family, _, cell in cells()))
    found = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for out in pool.map(_run_process, shares):
            for entry in json.loads(out):
                result = CellResult(Cell(**entry["cell"]), Agreement(**entry["agreement"]))
                found[entry["family"], entry["variant"], result.cell] = result
    return found


def _run_process(share: tuple[str, str]) -> str:
    product, family = share
    done = subprocess.run(
        [sys.executable, __file__, "--product", product, "--family", family],
        env={**os.environ, "NPU_ZOO_SIMULATE": product, **_ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the run of {family} on {product} failed")
    return done.stdout


def records(results: dict[tuple[str, str, Cell], CellResult]) -> dict[str, list[EvidenceRecord]]:
    """By family, the records of rows whose cells have all passed."""
    found: dict[str, list[EvidenceRecord]] = {}
    for family, variant, row in rows():
        of_row = [results[family.name, variant.name, cell] for cell in cells_of(row)]
        if not all(result.passes for result in of_row):
            print(f"{family.name}: not within the bounds: {[r for r in of_row if not r.passes]}", file=sys.stderr)
            continue
        shape = {"variant": variant.name, **{name: getattr(_shape(variant), name) for name in _SHOWN}}
        code = code_digest(evidence_files(PLUGINS / family.name))
        found.setdefault(family.name, []).append(record_of(family, row, shape, of_row, code))
    return found


def _shape(variant: VariantSpec) -> ModelConfig:
    """What ran: the bundled checkpoint, or a random model with the variant's heads."""
    directory = bundled_directory(variant)
    if directory is not None:
        return ModelConfig.from_hf(read_config(directory))
    assert variant.config is not None
    return rank_shape(variant.config, Split())


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", help="run this one alone and print its results; NPU_ZOO_SIMULATE must name it")
    parser.add_argument("--family", default="", help="with --product: this family alone")
    parser.add_argument("--check", action="store_true", help="compare with what is committed")
    arguments = parser.parse_args()
    if arguments.product:
        results = run_share(arguments.product, arguments.family)
        print(json.dumps(results))
        return 0
    differs = False
    for family, made in records(run_all()).items():
        file = PLUGINS / family / "evidence.json"
        text = json.dumps([record.model_dump(mode="json") for record in made], indent=2) + "\n"
        if arguments.check:
            kept = get_registry().families[family].records
            differs |= [(r.row, r.code) for r in kept] != [(r.row, r.code) for r in made]
        else:
            file.write_text(text, encoding="utf-8")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
