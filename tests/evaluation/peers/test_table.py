"""From samples to the table, the remarks and the figures."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo.evaluation.peers.cases import CATALOGUE
from npu_zoo.evaluation.peers.result import Agreement, CaseResult, ComparisonBody, EngineEntry, NeededWork
from npu_zoo.evaluation.peers.table import HEADS, WORK_HEADS, figure_text, remarks, table_rows, work_rows


def body(*cases: CaseResult, engines: tuple[str, ...] = ("npu-zoo", "vllm"), **fields: Any) -> ComparisonBody:
    entries = [EngineEntry(name=name, python="python", versions={}) for name in engines]
    return ComparisonBody(engines=entries, rounds=3, cases=list(cases), **fields)


def result(name: str, rounds: list[dict[str, float]], **fields: Any) -> CaseResult:
    return CaseResult.of(CATALOGUE[name]).model_copy(update={"rounds": rounds, **fields})


def pairs(*values: tuple[float, float]) -> list[dict[str, float]]:
    return [{"npu-zoo": own, "vllm": other} for own, other in values]


def test_the_ratio_is_the_median_of_pairs_and_not_of_medians() -> None:
    case = result("decode-1", pairs((10, 10), (30, 10), (40, 20)), floor=60.0, limit="memory")
    rows = table_rows(body(case))
    assert rows == [
        ("decode, batch 1", "npu-zoo", "30.0 tokens/s", "", "50%"),
        ("", "vllm", "10.0 tokens/s", "2.00 (1.00..3.00)", "17%"),
        ("", "floor", "60.0 tokens/s", "", "memory"),
    ]
    assert all(len(row) == len(HEADS) for row in rows)
    assert body(case).figures() == {"decode-1 npu-zoo tokens/s": 30.0, "decode-1 ratio to vllm": 2.0}


def test_above_one_is_better_where_less_is_better() -> None:
    case = result("memory", pairs((2.0, 4.0)), floor=1.0, limit="size")
    own, other, _ = table_rows(body(case))
    assert (own[4], other[3], other[4]) == ("50%", "2.00 (2.00..2.00)", "25%")


def test_failures_stand_in_the_table_and_below_it() -> None:
    case = result("decode-1", [{"npu-zoo": 3.0}] * 2, failures={"vllm": "warm-up: out of memory"})
    rows = table_rows(body(case))
    assert rows[1] == ("", "vllm", "failed", "", "")
    assert len(rows) == 2  # the machine was not measured
    assert remarks(body(case)) == ["vllm failed in decode-1, warm-up: out of memory"]
    assert body(case).figures() == {"decode-1 npu-zoo tokens/s": 3.0}


def test_where_greedy_tokens_differ_is_said_counted_from_one() -> None:
    equal = result("decode-1", pairs((1, 1)), agreement={"vllm": Agreement.of([1, 2], [1, 2])})
    differing = result("decode-8", pairs((1, 1)), agreement={"vllm": Agreement.of([1, 2, 3], [1, 9, 3])})
    (line,) = remarks(body(equal, differing))
    assert line == (
        "greedy tokens of vllm are npu-zoo's in 1 of 2 cases' first requests; they differ in decode-8 from token 2 of 3"
    )


def test_what_took_no_part_is_said() -> None:
    found = body(missing={"llama.cpp": "pip install it"}, skipped={"mixed": "needs 641 tokens"})
    assert remarks(found) == ["mixed is left out: it needs 641 tokens", "llama.cpp is not there: pip install it"]


def test_what_the_floor_is_made_of_is_shown() -> None:
    work = NeededWork(bytes=3 * 2**30, operations=25 * 10**9, tokens=1234)
    held = NeededWork(bytes=2**29, operations=0, tokens=0)
    rows = work_rows(body(result("decode-1", [], work=work), result("memory", [], work=held), result("mixed", [])))
    assert rows == [
        ("decode, batch 1", "3.00", "25.0", "1,234"),
        ("peak memory, 8 x 512 prompt, 16 new", "0.50", "-", "-"),
    ]
    assert all(len(row) == len(WORK_HEADS) for row in rows)


def test_preemptions_of_a_total_and_notes_are_told() -> None:
    runs = [{"npu-zoo": {"preemptions": 2}, "vllm": {}}, {"npu-zoo": {"preemptions": 1}}]
    assert remarks(body(result("mixed", [], runs=runs), notes=["the cache is small"])) == [
        "npu-zoo took room from running sequences in mixed (3 preemptions in all rounds)",
        "the cache is small",
    ]


def test_a_body_from_before_notes_is_read() -> None:
    old = body().model_dump(mode="json")
    del old["notes"]
    assert ComparisonBody.model_validate(old) == body()


def test_the_body_survives_a_file() -> None:
    case = result("mixed", pairs((1, 2)), agreement={"vllm": Agreement.of([1], [2])})
    assert ComparisonBody.model_validate(body(case).model_dump(mode="json")) == body(case)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.00123, "0.0012")])
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert figure_text(value) == text
