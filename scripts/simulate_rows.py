"""Run every matrix row that one simulated device can run, and write the families' evidence.json.

    .venv-npu/bin/python scripts/simulate_rows.py            # all products, a process for each
    .venv-npu/bin/python scripts/simulate_rows.py --check    # writes nothing; fails where the committed records differ

A row's record is written when all of its cells are within their bounds; its figures are the worst differences seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import npu_zoo
from npu_zoo.checkpoint import read_config
from npu_zoo.core.evidence import EvidenceRecord, code_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory
from npu_zoo.testing.agreement import Agreement
from npu_zoo.testing.simulation import Cell, CellResult, cells_of, evidence_files, record_of, run_cell

PLUGINS = Path(__file__).parent.parent / "npu_zoo" / "plugins"
PRODUCTS = ("atlas_800i_a2", "atlas_800t_a2", "atlas_300i_duo")
_SHOWN = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def rows() -> list[tuple[FamilySpec, VariantSpec, FeatureRow]]:
    """The rows that one device can run, each with the bundled variant that runs it."""
    return [
        (family, variant, row)
        for family in get_registry().families.values()
        for variant in family.variants
        if variant.bundled
        for row in family.matrix.of_size(variant.size)
        if cells_of(row)
    ]


def run_product(product: str) -> list[dict[str, object]]:
    """The results of all cells of one product, which this process simulates."""
    npu_zoo.simulate()
    found = []
    for family, variant, row in rows():
        for cell in cells_of(row):
            if cell.hardware == product:
                result = run_cell(family, variant, cell)
                print(f"{family.name}: {result}", file=sys.stderr, flush=True)
                found.append({"family": family.name, **asdict(result)})
    return found


def run_all() -> dict[tuple[str, Cell], CellResult]:
    """The results of all products."""
    processes = {
        product: subprocess.Popen(
            [sys.executable, __file__, "--product", product],
            env={**os.environ, "NPU_ZOO_SIMULATE": product, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for product in PRODUCTS
    }
    found = {}
    for product, process in processes.items():
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the run on {product} failed")
        for entry in json.loads(out):
            result = CellResult(Cell(**entry["cell"]), Agreement(**entry["agreement"]))
            found[entry["family"], result.cell] = result
    return found


def records(results: dict[tuple[str, Cell], CellResult]) -> dict[str, list[EvidenceRecord]]:
    """By family, the records of rows whose cells have all passed."""
    found: dict[str, list[EvidenceRecord]] = {}
    for family, variant, row in rows():
        of_row = [results[family.name, cell] for cell in cells_of(row)]
        if not all(result.passes for result in of_row):
            print(f"{family.name}: not within the bounds: {[r for r in of_row if not r.passes]}", file=sys.stderr)
            continue
        directory = bundled_directory(variant)
        assert directory is not None
        config = ModelConfig.from_hf(read_config(directory))
        shape = {"variant": variant.name, **{name: getattr(config, name) for name in _SHOWN}}
        code = code_digest(evidence_files(PLUGINS / family.name))
        found.setdefault(family.name, []).append(record_of(family, row, shape, of_row, code))
    return found


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", help="run this one alone and print its results; NPU_ZOO_SIMULATE must name it")
    parser.add_argument("--check", action="store_true", help="compare with what is committed")
    arguments = parser.parse_args()
    if arguments.product:
        results = run_product(arguments.product)
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
