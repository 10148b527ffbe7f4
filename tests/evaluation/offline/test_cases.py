from __future__ import annotations

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.offline.cases import Case, read_cases


@pytest.mark.parametrize(
    ("pairs", "batches", "expected"),
    [
        ("[[8,4]]", "1", [(8, 4, 1)]),
        ("[8,4]", "1", [(8, 4, 1)]),
        ("8,4", "2", [(8, 4, 2)]),
        (" [ [8 , 4],\t[2,2] ] ", " 1 , 4 ", [(8, 4, 1), (2, 2, 1), (8, 4, 4), (2, 2, 4)]),
        ("[[8,4],[2,2]]", "[4,1]", [(8, 4, 4), (2, 2, 4), (8, 4, 1), (2, 2, 1)]),
        ("[[8,4],[2,2]]", "[[1,4],[1,8]]", [(8, 4, 1), (2, 2, 1), (8, 4, 4), (2, 2, 8)]),
        ("[[2,2],[8,4]]", "[[1],[3]]", [(2, 2, 1), (8, 4, 3)]),
    ],
)
def test_forms_that_mindie_takes(pairs: str, batches: str, expected: list[tuple[int, int, int]]) -> None:
    listed = read_cases(pairs, batches)
    assert listed.cases == tuple(Case(*case) for case in expected)


def test_pairs_run_from_large_to_small_and_it_is_said() -> None:
    listed = read_cases("[[2,2],[8,4],[4,8]]", "1")
    assert [case[:2] for case in listed.cases] == [(8, 4), (4, 8), (2, 2)]
    assert "large to small" in listed.notes[0]
    assert read_cases("[[8,4],[4,8],[2,2]]", "1").notes == ()


def test_a_case_that_is_given_twice_runs_once_and_it_is_said() -> None:
    listed = read_cases("[[8,4],[8,4]]", "1,4,1")
    assert listed.cases == (Case(8, 4, 1), Case(8, 4, 4))
    assert "[8,4] x 1, [8,4] x 4" in listed.notes[0]


@pytest.mark.parametrize(
    ("pairs", "batches", "named"),
    [
        ("", "1", "--cases '' is empty"),
        ("[]", "1", "--cases '[]' is empty"),
        ("[[]]", "1", "the entry [] is no pair"),
        ("[8]", "1", "the entry [8] is no pair"),
        ("[[8,4],[8,4,2]]", "1", "the entry [8, 4, 2] is no pair"),
        ("[[8,4],7]", "1", "the entry 7 is no pair"),
        ("[[8,-4]]", "1", "the entry [8, -4] holds -4"),
        ("[[0,4]]", "1", "the entry [0, 4] holds 0"),
        ("[[8,4.5]]", "1", "the entry [8, 4.5] holds 4.5"),
        ('[[8,"4"]]', "1", 'holds "4"'),
        ("[[8,true]]", "1", "holds true"),
        ("[[8 4]]", "1", "is no list of numbers"),
        ("[" * 100_000, "1", "is no list of numbers"),
        ("[[8,4]]", "", "--batch '' is empty"),
        ("[[8,4]]", "0", "--batch: the entry [0] holds 0"),
        ("[[8,4]]", "1,x", "is no list of numbers"),
        ("[[8,4],[2,2]]", "[[1]]", "1 list(s) of batch sizes for 2 pair(s)"),
        ("[[8,4],[2,2]]", "[[1],[]]", "the entry [] is no list of batch sizes"),
        ("[[8,4],[2,2]]", "[[1],2]", "the entry 2 is no list of batch sizes"),
    ],
)
def test_what_is_no_case_is_named_with_an_example(pairs: str, batches: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_cases(pairs, batches)
    assert named in str(refused.value)
    assert "[[2048,2048]" in str(refused.value) or "[[1,4],[1,8]]" in str(refused.value)
