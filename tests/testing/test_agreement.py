"""What counts as agreement of two runs, and evidence made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import npu_zoo
from npu_zoo.core.engine import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.evidence import EvidenceRecord, code_digest, proven, read_records, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.parallel import Split
from npu_zoo.registry import get_registry
from npu_zoo.testing.agreement import Agreement, compare
from npu_zoo.testing.evidence import evidence_files, stale_records
from npu_zoo.testing.simulation import Cell, CellResult, cells_of, record_of

PLUGINS = Path(npu_zoo.__file__).parent / "plugins"
ROW = FeatureRow(
    sizes=("demo",), hardware=("atlas_800i_a2", "atlas_800t_a2"), dtype=("float16",), world_size=(1,),
    attention=("paged", "flash"), source="zoo",
)  # fmt: skip


def output(scores: list[float], tokens: list[int], best: list[tuple[float, float]]) -> RequestOutput:
    logprobs = [{7: Logprob(a, 1, ""), 8: Logprob(b, 2, "")} for a, b in best]
    completion = CompletionOutput(0, token_ids=tokens, logprobs=logprobs)
    prompt = [None, *({3: Logprob(score, 1, "")} for score in scores)]
    return RequestOutput("0", None, [3] * len(prompt), [completion], True, RequestMetrics(0.0), prompt)


def test_the_worst_score_counts() -> None:
    one, other = output([-1.0, -2.0], [7], [(-0.1, -3.0)]), output([-1.25, -2.0], [7], [(-0.1, -3.0)])
    assert compare([one], [other]) == Agreement(3, 0.25, 1, 0.0, 0.125)


def test_tokens_may_differ_where_the_two_best_are_close() -> None:
    one = output([-1.0], [7, 7, 7], [(-0.1, -3.0), (-0.7, -0.75), (-0.1, -9.0)])
    other = output([-1.0], [7, 8, 8], [(-0.1, -3.0), (-0.7, -0.75), (-0.1, -9.0)])
    found = compare([one], [other])
    assert (found.equal_tokens, round(found.worst_gap, 3)) == (1, 0.05)
    assert found.within(0.06)
    assert not found.within(0.04)


def test_another_number_of_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([output([-1.0], [7], [(0, -1)])], [output([-1.0, -1.0], [7], [(0, -1)])])


def test_cells_are_the_product_of_what_a_row_offers() -> None:
    assert len(cells_of(ROW)) == 4
    several = cells_of(ROW.model_copy(update={"world_size": (1, 8, 4), "parallelism": ("tp", "tp+ep")}))
    assert {(cell.split, cell.devices) for cell in several} == {(Split(4), 4), (Split(4, ep=4), 4)}
    assert cells_of(ROW.model_copy(update={"world_size": (16, 32)})) == []
    assert cells_of(ROW.model_copy(update={"world_size": (2,), "parallelism": ("tp8+ep8",)})) == []
    assert cells_of(ROW.model_copy(update={"hardware": ("cpu",)})) == []
    quantized = cells_of(ROW.model_copy(update={"quantization": ("none", "w8a8"), "kv_cache_dtype": ("auto", "int8")}))
    assert len(quantized) == 4 * 4
    assert "atlas_800t_a2_float16_flash_w8a8_int8_cache" in {cell.name for cell in quantized}


def test_bounds_go_by_dtype() -> None:
    seen = Agreement(10, 0.2, 5, 0.0)
    assert CellResult(Cell("atlas_800i_a2", "bfloat16", "paged"), seen).passes
    assert not CellResult(Cell("atlas_800i_a2", "float16", "paged"), seen).passes


def test_records_raise_their_row_and_no_other(tmp_path: Path) -> None:
    record = EvidenceRecord(
        family="f", row=row_digest(ROW), level="simulated", date="2026-01-01", shape={}, versions={}, code="c"
    )
    other = ROW.model_copy(update={"dtype": ("bfloat16",)})
    assert [row.evidence for row in proven((ROW, other), [record])] == ["simulated", "claimed"]
    measured = record.model_copy(update={"level": "measured"})
    assert (
        proven((ROW,), [measured, record])[0].evidence == proven((ROW,), [record, measured])[0].evidence == "measured"
    )
    file = tmp_path / "evidence.json"
    assert read_records(file) == ()
    file.write_text(json.dumps([record.model_dump(mode="json")]))
    assert read_records(file) == (record,)
    file.write_text('[{"family": "f"}]')
    with pytest.raises(ValueError, match="row"):
        read_records(file)


@pytest.mark.parametrize("name", sorted(get_registry().families))
def test_committed_evidence_is_of_the_code_at_hand(name: str) -> None:
    family, plugin = get_registry().families[name], get_registry().plugins[name]
    assert family.records
    assert stale_records(family, plugin) == [], "run `make evidence`"
    simulated = {row_digest(row) for row in family.rows if row.evidence == "simulated"}
    assert simulated == {record.row for record in family.records}
    assert simulated == {row_digest(row) for row in family.rows if cells_of(row)}


def test_a_changed_kernel_makes_evidence_stale(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text("def f(x):\n    return x * 2\n")
    before = code_digest([kernel])
    kernel.write_text('"""A page."""\n\n\ndef f(x):  # twice\n    """Doc."""\n    return x * 2\n')
    assert code_digest([kernel]) == before
    kernel.write_text("def f(x):\n    return x * 3\n")
    assert code_digest([kernel]) != before


def test_evidence_rests_on_the_engine_the_layers_and_the_plugin() -> None:
    registry = get_registry()
    files = evidence_files(registry.families["deepseek_v3"], registry.plugins["deepseek_v3"])
    found = {path.relative_to(PLUGINS.parent).as_posix() for path in files}
    assert {"engine/runner.py", "nn/kernels/ascend.py", "plugins/deepseek_v3/model.py", "core/attention.py"} <= found
    assert not [path for path in found if path.startswith(("simulator", "plugins/wizardcoder", "cli"))]


def test_a_record_names_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.testing.simulation.metadata.version", lambda name: f"{name}-1")
    family = get_registry().families["wizardcoder"]
    cells = {"atlas_800i_a2_float16_paged": {"worst_logprob_difference": 0.0123, "tokens": 10.0}}
    record = record_of(family, ROW, {"head_dim": 128, "devices": 1}, cells, "abc", versions={"soc": "910B4"})
    assert record.figures == {
        "atlas_800i_a2_float16_paged_worst_logprob_difference": 0.0123,
        "atlas_800i_a2_float16_paged_tokens": 10,
    }
    assert (record.row, record.code, record.shape) == (row_digest(ROW), "abc", {"head_dim": 128, "devices": 1})
    assert (record.versions["torch_npu"], record.versions["soc"]) == ("torch_npu-1", "910B4")
