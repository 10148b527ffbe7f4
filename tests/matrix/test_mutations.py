"""Changes of single cells of the built-in matrices: some of all are tried here, all of them in `make verify`."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.registry import get_registry

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate_matrices.py"
FAMILIES = get_registry().families


def load() -> Any:
    spec = importlib.util.spec_from_file_location("mutate_matrices", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load()
CODER = FAMILIES["deepseek_coder"]
ON_800I = 0
ON_CPU = next(number for number, row in enumerate(CODER.rows) if row.hardware == ("cpu",))


def find(row: int, axis: str, what: str) -> Any:
    return next(m for m in script.mutations(CODER, row) if (m.axis, m.what) == (axis, what))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_is_noticed(name: str) -> None:
    family = FAMILIES[name]
    every = itertools.chain.from_iterable(script.mutations(family, number) for number in range(len(family.rows)))
    outcomes = [script.judge(mutation) for mutation in itertools.islice(every, 3, None, 120)]
    assert len({outcome.axis for outcome in outcomes}) > 5
    assert [outcome for outcome in outcomes if not outcome.table] == []


def test_every_cell_of_a_row_is_changed_in_every_way() -> None:
    family = FAMILIES["deepseek_moe"]
    found = {(m.axis, m.kind) for row in range(len(family.rows)) for m in script.mutations(family, row)}
    kinds = {axis: {kind for other, kind in found if other == axis} for axis, _ in found}
    assert kinds == {
        **{axis: {"drop", "add", "replace"} for axis in script.SETS},
        **{axis: {"replace"} for axis in script.SINGLE},
        script.WHOLE: {"drop", "add"},
    }


@pytest.mark.parametrize("row", [ON_800I, ON_CPU])
def test_a_mutation_differs_from_the_matrix_in_one_field_of_one_row(row: int) -> None:
    for mutation in script.mutations(CODER, row):
        if mutation.axis == script.WHOLE:
            assert abs(len(mutation.rows) - len(CODER.rows)) == 1
            continue
        assert [n for n, (a, b) in enumerate(zip(mutation.rows, CODER.rows, strict=True)) if a != b] == [row]
        assert (
            mutation.after.model_copy(update={mutation.axis: getattr(mutation.before, mutation.axis)})
            == mutation.before
        )


@pytest.mark.parametrize(
    ("row", "axis", "what", "spec", "build", "run"),
    [
        (ON_800I, "world_size", "3", False, True, None),  # 16 heads
        (ON_800I, "parallelism", "tp+ep", False, False, None),  # others make its world sizes too
        (ON_800I, "parallelism", "tp by tp+ep", True, True, None),  # of one rank it makes nothing; there are no experts
        (ON_800I, "sizes", "33b", False, False, None),  # it has world sizes that fit
        (ON_800I, "dtype", "float32", True, False, None),
        (ON_800I, "hardware", "atlas_300i_duo", True, False, None),  # no bfloat16
        (ON_CPU, "quantization", "sparse", True, False, True),
        (ON_CPU, "kv_cache_dtype", "int8", False, False, False),
        (ON_CPU, "serving", "tgi", False, False, False),
        (ON_CPU, "dtype", "float32", False, False, None),  # dropped
        (ON_CPU, "hardware", "cuda", False, False, None),
    ],
)
def test_who_notices(row: int, axis: str, what: str, spec: bool, build: bool, run: bool | None) -> None:
    mutation = find(row, axis, what)
    seen = (script.seen_by_spec(mutation), script.seen_by_build(mutation), script.seen_by_run(mutation))
    assert seen == (spec, build, run)
    assert script.seen_by_table(mutation)
    assert script.seen_by_refusals(mutation)


def test_weights_that_do_not_fit_a_device_are_noticed_by_build() -> None:
    family = FAMILIES["deepseek_v3"]
    assert family.rows[0].quantization == ("none",)
    less = [m for m in script.mutations(family, 1) if (m.axis, m.what) == ("quantization", "w8a16 by none")]
    assert [script.seen_by_build(mutation) for mutation in less] == [True]


def test_attention_that_nothing_computes_is_noticed_by_a_run() -> None:
    family = FAMILIES["deepseek_v3"]
    row = next(number for number, row in enumerate(family.rows) if row.hardware == ("cpu",))
    flash = [m for m in script.mutations(family, row) if m.axis == "attention"]
    assert [(m.what, script.seen_by_run(m)) for m in flash] == [("flash", True), ("paged by flash", True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_as_they_are_are_noticed_by_nobody(name: str) -> None:
    family = FAMILIES[name]
    part = script.Part(get_registry().plugins[get_registry().owner(name)], get_registry())
    for number, row in enumerate(family.rows):
        claims = [c for c in script.spec_claims(part, family, number, row) if c.subject.axis != "row"]
        assert {claim.judge().status for claim in claims} == {"holds"}
        assert not script._unbuildable(name, row)


def test_without_a_table_a_change_can_go_unnoticed() -> None:
    bare = CODER.model_copy(update={"truth": ""})
    unseen = [script.judge(m) for m in script.mutations(bare, ON_800I) if (m.axis, m.what) == ("dtype", "float16")]
    assert [outcome.noticed for outcome in unseen] == [False]


def test_the_report_counts_and_lists() -> None:
    seen = script.Outcome("deepseek_coder", 0, "dtype", "add", "float16", table=True, refusals=True)
    built = script.Outcome("deepseek_coder", 0, "world_size", "add", "3", table=True, build=True)
    missed = script.Outcome("deepseek_coder", 0, "dtype", "add", "float32", run=False)
    assert script.summary([seen, built, missed]) == [
        ("deepseek_coder", "dtype", "2", "1", "1", "1", "0", "0", "0", "1"),
        ("deepseek_coder", "world_size", "1", "1", "1", "0", "0", "1", "0", "0"),
        ("all", "", "3", "2", "2", "1", "0", "1", "0", "1"),
    ]
    text = script.markdown([seen, built, missed])
    assert "2 of 3 changes are noticed (66.67%)" in text
    assert text.splitlines()[-1] == "| all |  | 3 | 2 | 2 | 1 | 0 | 1 | 0 | 1 |"
    assert script.listed([seen]) == ["deepseek_coder, row 1 (1.3b on atlas_800i_a2), dtype: add float16"]


@pytest.mark.parametrize(("noticed", "code"), [(True, 0), (False, 1)])
def test_a_change_that_nobody_notices_fails(
    noticed: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcome = script.Outcome("deepseek_coder", 0, "dtype", "add", "float16", table=noticed)
    monkeypatch.setattr(script, "judge_all", lambda families: [outcome])
    assert script.main(["--list", "--markdown", str(tmp_path / "page.md")]) == code
    out, err = capsys.readouterr()
    line = "deepseek_coder, row 1 (1.3b on atlas_800i_a2), dtype: add float16\n"
    assert (line in out, err) == (noticed, "" if noticed else f"noticed by nobody: {line}")
    assert (tmp_path / "page.md").read_text(encoding="utf-8").count(f"\n{int(noticed)} of 1 changes are noticed") == 1
    assert script.main(["--check", str(tmp_path / "page.md")]) == code
    (tmp_path / "page.md").write_text("another")
    assert script.main(["--check", str(tmp_path / "page.md")]) == 1
