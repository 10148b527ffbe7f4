"""What is measured on the machine at hand, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npu_zoo.core.evidence import read_records, row_digest
from npu_zoo.core.features import FeatureRow


def test_a_cpu_s_row_is_measured_and_recorded(tmp_path: Path, install: Callable[..., None], validate: Callable) -> None:
    install(tmp_path, "orchid", "FAMILY = family({}, {'hardware': ('atlas_800i_a2',), 'dtype': ('float16',)})")
    folder = tmp_path / "evidence"
    ran = validate(tmp_path, "--plugin", "orchid", "--measure", "--hardware", "cpu", "--evidence", str(folder))
    assert ran.code == 0, ran.err
    (claim,) = ran.report["claims"]
    assert (claim["row"], claim["axis"], claim["claim"]) == (1, "hardware", "measured: cpu_float32_paged")
    (record,) = read_records(folder / "orchid.json")
    row = FeatureRow(
        sizes=("1b",), hardware=("cpu",), dtype=("float32",), world_size=(1,), attention=("paged",), source="zoo"
    )  # fmt: skip
    assert (record.family, record.level, record.row) == ("orchid", "measured", row_digest(row))
    assert record.figures["cpu_float32_paged_decode_tokens_per_s"] > 0
    assert record.figures["cpu_float32_paged_worst_logprob_difference"] < 1e-3
    assert {"torch", "npu_zoo", "cpu"} <= record.versions.keys()
    assert record.shape["devices"] == 1
    assert f"note: wrote records of 1 rows to {folder / 'orchid.json'}" in ran.err


def test_rows_for_other_hardware_are_nothing_to_measure(
    tmp_path: Path, install: Callable[..., None], validate: Callable
) -> None:
    install(tmp_path, "orchid", "FAMILY = family({'hardware': ('atlas_800i_a2',), 'dtype': ('float16',)})")
    ran = validate(tmp_path, "--plugin", "orchid", "--measure", "--hardware", "cpu")
    assert (ran.code, ran.out, ran.report) == (4, "", {})
    assert "this machine is cpu, and rows are for atlas_800i_a2: nothing to measure" in ran.err


def test_records_without_a_place_are_refused_before_anything_runs(
    tmp_path: Path, install: Callable[..., None], validate: Callable
) -> None:
    install(tmp_path, "orchid")
    (tmp_path / "orchid.json").write_text('{"mine": 1}')
    ran = validate(tmp_path, "--plugin", "orchid", "--measure", "--hardware", "cpu", "--evidence", str(tmp_path))
    assert (ran.code, ran.out) == (2, "")
    assert "orchid.json exists and holds no evidence records; remove it, or --evidence DIR" in ran.err
    assert (tmp_path / "orchid.json").read_text() == '{"mine": 1}'
