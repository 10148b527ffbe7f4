"""Records of results that become evidence of rows, and those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npu_zoo.cli.app import run_app
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import EvidenceRecord, proven, read_records, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.citing import Citation, cite
from npu_zoo.evaluation.record import Machine, ModelUnderTest, ResultRecord, write_record
from npu_zoo.registry import PluginRecord, Registry, get_registry
from npu_zoo.testing.evidence import current_code
from npu_zoo.testing.simulation import measured_cells
from npu_zoo.testing.validation.claims import Outcome
from npu_zoo.testing.validation.records import write_records
from npu_zoo.testing.validation.scope import Part

PRODUCTS = ("atlas_800i_a2", "atlas_300i_duo")
COMMON: dict[str, Any] = {"sizes": ("demo",), "attention": ("paged", "flash"), "source": "zoo"}
ROWS = (
    FeatureRow(hardware=PRODUCTS, dtype=("float16",), world_size=(1, 2), **COMMON),
    FeatureRow(hardware=("cpu",), dtype=("float32",), world_size=(1,), **COMMON),
)
FAMILY = get_registry().families["wizardcoder"].model_copy(
    update={"name": "orchid", "rows": ROWS, "records": (), "truth": "", "denials": ()}
)  # fmt: skip
PLUGIN = PluginRecord("orchid", "npu_zoo.plugins.wizardcoder", registered={"register_families": ["orchid"]})
REGISTRY = Registry()
REGISTRY.families, REGISTRY.plugins = {"orchid": FAMILY}, {"orchid": PLUGIN}
MODEL = ModelUnderTest(
    family="orchid", variant="demo", weights="w" * 16, hardware=PRODUCTS[0], dtype="float16", world_size=1, split="tp1",
    attention="paged", quantization="none", kv_cache_dtype="auto", serving="offline", row=row_digest(ROWS[0]),
    code=current_code(FAMILY, PLUGIN), shape={"hidden_size": 64, "num_hidden_layers": 2},
)  # fmt: skip
MACHINE = Machine(
    hardware=PRODUCTS[0], cpu="k", cores=8, memory_gib=9, system="Linux", python="3", devices={"cann": "9"}
)


@pytest.fixture
def result(tmp_path: Path) -> Any:
    """Writes a record of a run with some other fields."""
    count = iter(range(99))

    def write(*, kind: str = "bench offline", date: str = "2026-03-04T05:06:07+00:00", **changes: Any) -> Path:
        record = ResultRecord(
            kind=kind,  # type: ignore[arg-type]
            date=date,
            versions={"npu_zoo": "1", "torch": "2.9"},
            machine=MACHINE,
            model=MODEL.model_copy(update={name: v for name, v in changes.items() if name != "figures"}),
            figures=changes.get("figures", {"tokens_per_s": 3.5}),
        )
        path = tmp_path / f"{next(count)}.json"
        write_record(record, path)
        return path

    return write


def cited(folder: Path, *files: Path) -> list[Citation]:
    return cite(files, REGISTRY, folder)


def test_a_row_is_measured_once_all_of_its_combinations_were(tmp_path: Path, result: Any) -> None:
    folder = tmp_path / "evidence"
    paged = result()
    (citation,) = cited(folder, paged)
    assert citation.missing == ["atlas_800i_a2_float16_flash"]
    assert {*citation.cells} == {cell.name for cell in measured_cells(ROWS[0], PRODUCTS[0], 1)}
    assert (citation.file, citation.row) == (None, 1)
    assert not folder.exists()
    later = {"date": "2026-05-01T00:00:00+00:00", "figures": {"tokens_per_s": 4.5}}
    (citation,) = cited(
        folder, paged, result(attention="flash"), result(**later), result(kind="eval", figures={"a": 1})
    )
    assert citation.missing == []
    (record,) = read_records(folder / "orchid.json")
    assert record == EvidenceRecord(
        family="orchid",
        row=row_digest(ROWS[0]),
        level="measured",
        date="2026-05-01",
        shape={
            "variant": "demo", "hidden_size": 64, "num_hidden_layers": 2, "hardware": PRODUCTS[0], "devices": 1,
            "cited": "bench offline, eval",
        },
        versions={"npu_zoo": "1", "torch": "2.9", "cpu": "k", "cann": "9"},
        figures={
            "atlas_800i_a2_float16_paged_bench_offline_tokens_per_s": 4.5,
            "atlas_800i_a2_float16_paged_eval_a": 1.0,
            "atlas_800i_a2_float16_flash_bench_offline_tokens_per_s": 3.5,
        },
        code=MODEL.code,
    )  # fmt: skip
    row, other = proven(ROWS, [record])
    assert (row.evidence, row.evidence_devices, other.evidence) == ("measured", (1,), "claimed")


def test_places_are_cited_apart_and_each_replaces_its_own(tmp_path: Path, result: Any) -> None:
    both = [result(), result(attention="flash")]
    two = [result(attention=name, world_size=2, split="tp2") for name in ("paged", "flash")]
    duo = [result(attention=name, hardware=PRODUCTS[1]) for name in ("paged", "flash")]
    lone = result(hardware="cpu", dtype="float32", row=row_digest(ROWS[1]))
    found = cited(tmp_path, *both, *two, lone)
    assert [(c.place.devices, c.missing) for c in found] == [(1, []), (2, []), (1, ["cpu_float32_flash"])]
    cited(tmp_path, *duo)
    before = read_records(tmp_path / "orchid.json")
    assert [(r.shape["hardware"], r.shape["devices"]) for r in before] == [
        (PRODUCTS[0], 1), (PRODUCTS[0], 2), (PRODUCTS[1], 1),
    ]  # fmt: skip
    assert proven(ROWS, before)[0].evidence_devices == (1, 2)
    cited(tmp_path, result(figures={"b": 2}), result(attention="flash", figures={}))
    after = read_records(tmp_path / "orchid.json")
    assert len(after) == 3
    assert next(r for r in after if r.shape == before[0].shape).figures == {
        "atlas_800i_a2_float16_paged_bench_offline_b": 2.0
    }


def test_validation_and_citing_leave_each_other_s_records(tmp_path: Path, result: Any) -> None:
    part = Part(PLUGIN, REGISTRY)
    figures = {"cell": "atlas_800i_a2_float16_paged", "devices": 1, "tokens": 12}
    outcomes = [Outcome("run", part.subject(FAMILY, ROWS[0]), "agrees", "holds", figures=figures)]
    files = [result(), result(attention="flash")]
    for _ in range(2):
        cited(tmp_path, *files)
        write_records([part], outcomes, "measured", tmp_path)
        found = read_records(tmp_path / "orchid.json")
        assert sorted("cited" in record.shape for record in found) == [False, True]
        assert {record.level for record in found} == {"measured"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulated": True}, "was simulated, and a simulated device measures nothing"),
        ({"family": "tulip"}, "no model family is named 'tulip'; families: orchid"),
        ({"row": "0" * 16}, "orchid has no row 0000000000000000 any more; run it again"),
        ({"code": "0" * 16}, "it ran with code 0000000000000000, and that at hand is"),
        ({"dtype": "bfloat16"}, "atlas_800i_a2, bfloat16, paged, none, auto, tp1 is no combination of its row"),
        ({"world_size": 2, "split": "pp2"}, "is no combination of its row"),
        ({"hardware": "cpu"}, "is no combination of its row"),
    ],
)
def test_what_proves_nothing_is_refused_by_name(
    tmp_path: Path, result: Any, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "evidence"
    bad = result(**changes)
    with pytest.raises(UsageError, match=rf"{bad.name} cannot be cited: .*{message}"):
        cited(folder, result(), result(attention="flash"), bad)
    assert not folder.exists()


def test_a_write_that_fails_leaves_what_was_cited(tmp_path: Path, result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [result(), result(attention="flash")]
    cited(tmp_path / "evidence", *files)
    before = (tmp_path / "evidence" / "orchid.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match=r"orchid\.json cannot be written: No space left on device"):
        cited(tmp_path / "evidence", *files)
    assert (tmp_path / "evidence" / "orchid.json").read_bytes() == before
    assert len(list((tmp_path / "evidence").iterdir())) == 1


def test_a_result_without_a_model_of_ours_is_of_no_row(tmp_path: Path) -> None:
    write_record(ResultRecord(kind="bench serve"), tmp_path / "a.json")
    with pytest.raises(UsageError, match="npu-zoo bench serve ran no model of the zoo's own"):
        cited(tmp_path, tmp_path / "a.json")


def test_the_command_cites_a_real_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        ModelUnderTest.of(resolve(EngineArgs(model="wizardcoder", hardware="cpu", dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    ]
    for number, model in enumerate(models):
        write_record(ResultRecord(kind="eval", model=model, figures={"acc": 0.5}), tmp_path / f"{number}.json")
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    code = run_app(["cite", *files, "--evidence", str(tmp_path / "evidence")])
    told = capsys.readouterr().out
    assert f"{models[0].family} row" in told
    (row,) = [row for row in get_registry().families[models[0].family].rows if row_digest(row) == models[0].row]
    cells = {cell.name for cell in measured_cells(row, "cpu", 1) if cell.devices == 1}
    missing = {name for name in cells if name not in ("cpu_float32_paged", "cpu_bfloat16_paged")}
    assert code == bool(missing)
    assert all(name in told for name in missing)
    assert (tmp_path / "evidence").exists() == (not missing)
    assert run_app(["cite", str(tmp_path / "none.json")]) == 2
