from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.programs.humaneval import Problem, read_problems
from npu_zoo.evaluation.programs.infilling import FORMS
from npu_zoo.evaluation.programs.sandbox import Limits, ProgramResult, Sandbox

ROW: dict[str, Any] = {
    "task_id": "T/0",
    "prompt": 'def halve(x):\n    """Half of x."""\n',
    "entry_point": "halve",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(3) == 1.5\n",
}
PLUS = ROW | {"base_input": [[3]], "plus_input": [[1.0], [50]], "atol": 0}
LIMITS = Limits(seconds=60, cpu_seconds=30)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def problems(test_data: Path) -> tuple[Problem, ...]:
    return read_problems(test_data / "humaneval").problems


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(sandbox: Sandbox, problems: tuple[Problem, ...], body: str | None) -> list[ProgramResult]:
    sources = [p.prompt + (p.canonical_solution if body is None else body) for p in problems]
    return sandbox.run_all(p.program(source) for p, source in zip(problems, sources, strict=True))


def test_canonical_solutions_pass_and_empty_ones_fail(sandbox: Sandbox, problems: tuple[Problem, ...]) -> None:
    assert len(problems) == 164
    assert [result for result in run(sandbox, problems, None) if not result.passed] == []
    assert [result.status for result in run(sandbox, problems, "")] == ["failed"] * 164


def test_without_landlock_too(problems: tuple[Problem, ...]) -> None:
    with Sandbox(LIMITS, workers=2, landlock=False) as sandbox:
        assert [result for result in run(sandbox, problems[::6], None) if not result.passed] == []


@pytest.mark.parametrize(
    ("name", "step"), [("HumanEvalPlus-Mini", 8), pytest.param("HumanEvalPlus", 1, marks=pytest.mark.long)]
)
def test_canonical_solutions_pass_the_tests_of_humaneval_plus(
    sandbox: Sandbox, test_data: Path, name: str, step: int
) -> None:
    found = read_problems(test_data / "humaneval_plus" / f"{name}.jsonl.gz").problems
    assert len(found) == 164
    assert [result for result in run(sandbox, found[::step], None) if not result.passed] == []
    assert [result.status for result in run(sandbox, found[::step], "")] == ["failed"] * len(found[::step])


def test_humaneval_plus_finds_what_humaneval_does_not(
    sandbox: Sandbox, problems: tuple[Problem, ...], test_data: Path
) -> None:
    plus = {p.task_id: p for p in read_problems(test_data / "humaneval_plus", "HumanEvalPlus-Mini").problems}
    wrong = [p for p in problems if p.task_id in ("HumanEval/76", "HumanEval/97", "HumanEval/150")]
    results = sandbox.run_all(plus[p.task_id].program(p.prompt + p.canonical_solution) for p in wrong)
    assert [result.status for result in results] == ["failed"] * 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("    return x / 2\n", "passed"),
        ("    return x / 2 + 1e-9\n", "passed"),
        ("    return x / 2 + 1e-4\n", "failed"),
        ("    return str(x / 2)\n", "failed"),
        ("    return x // 2\n", "failed"),
        ("    x = [] + 1\n", "failed"),
    ],
)
def test_answers_of_humaneval_plus_agree_as_evalplus_has_it(
    sandbox: Sandbox, tmp_path: Path, body: str, status: str
) -> None:
    problem = read_problems(write(tmp_path / "HumanEvalPlus.jsonl", PLUS)).problems[0]
    assert sandbox.run_all([problem.program(problem.prompt + body)])[0].status == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("    return (x / 2 + 1e-9, float('nan'), float('inf'))\n", "passed"),
        ("    return [x / 2, float('nan')]\n", "failed"),
        ("    return [x / 2, 0.0, float('inf')]\n", "failed"),
        ("    return x / 2\n", "failed"),
    ],
)
def test_sequences_of_floats_agree_item_by_item(sandbox: Sandbox, tmp_path: Path, body: str, status: str) -> None:
    row = PLUS | {"canonical_solution": "    return [x / 2, float('nan'), float('inf')]\n", "atol": 0}
    problem = read_problems(write(tmp_path / "HumanEvalPlus.jsonl", row)).problems[0]
    assert sandbox.run_all([problem.program(problem.prompt + body)])[0].status == status


PATCHES = {
    "a parser": "import json\njson.loads = lambda text: []\n",
    "a copier": "import copy\ncopy.deepcopy = lambda value: value\n",
    "builtins": "import builtins\nabs = builtins.abs = builtins.len = lambda x: 0\nzip = lambda *a: []\n",
    "a module": "import math\nmath.fabs = lambda x: 0.0\n",
    "a helper": "def near(*a): return True\ndef check(f): pass\n",
}
WORKING = "    import builtins, math\n    builtins.abs = math.fabs = builtins.all = lambda *a: 0\n"
NEAR = {
    "prompt": f"import math\n\n\ndef near(x, y):\n    return math.fabs(x - y) < 1e-6\n\n\n{ROW['prompt']}",
    "test": "def check(candidate):\n    import math\n    assert near(candidate(3), 1.5)\n"
    "    assert abs(candidate(3) - 1.5) < 1e-6 and math.fabs(candidate(3) - 1.5) < 1e-6\n",
}


def test_a_program_cannot_change_what_its_tests_use(sandbox: Sandbox, tmp_path: Path) -> None:
    rows = [ROW | NEAR, PLUS | {"task_id": "T/1", "atol": 1e-6}]
    for problem in read_problems(write(tmp_path / "data.jsonl", *rows)).problems:
        wrong, right = ROW["prompt"] + "    return 7.0\n", ROW["prompt"] + "    return x / 2\n"
        sources = [*(wrong + patch for patch in PATCHES.values()), ROW["prompt"] + WORKING + "    return 7.0\n"]
        assert {result.status for result in sandbox.run_all(map(problem.program, sources))} == {"failed"}
        sources = [right + patch for patch in (*PATCHES.values(), "list = zip = range = [1, 2, 3]\n")]
        assert {result.status for result in sandbox.run_all(map(problem.program, sources))} == {"passed"}


def test_an_answer_that_changes_its_arguments_is_tested_on_what_they_were(sandbox: Sandbox, tmp_path: Path) -> None:
    row = ROW | {"prompt": "def halve(x):\n", "canonical_solution": "    return len(x)\n"}
    row |= {"base_input": [[[1, 2]]], "plus_input": [[[3]]], "atol": 0}
    problem = read_problems(write(tmp_path / "data.jsonl", row)).problems[0]
    bodies = ("    n = len(x)\n    x.clear()\n    return n\n", "    x.clear()\n    return len(x)\n")
    results = sandbox.run_all(problem.program(problem.prompt + body) for body in bodies)
    assert [result.passed for result in results] == [True, False]
    assert results[1].message.startswith("AssertionError: [[1, 2]]")


def test_files_are_read_plain_and_compressed_and_from_folders(tmp_path: Path) -> None:
    plain = write(tmp_path / "HumanEval.jsonl", ROW)
    packed = tmp_path / "packed" / "HumanEval.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_problems(plain).problems == read_problems(packed.parent).problems == read_problems(tmp_path).problems
    assert len(read_problems(plain).sha256) == 64
    assert read_problems(plain).problems[0].program("x").entry_point == "halve"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, "row 2: prompt is of type int; a text is due"),
        ({"test": None}, "row 2: test is of type NoneType; a text is due, or base_input and plus_input"),
        ({"entry_point": "a b"}, "row 2: entry_point 'a b' is no function's name"),
        ({"plus_input": [3], "base_input": []}, "row 2: plus_input is of type list; a list of lists"),
        ({"plus_input": []}, "row 2: base_input is missing"),
        ({"plus_input": [], "base_input": [], "atol": "x"}, "row 2: atol is of type str; a number is due"),
        ({"task_id": "T/0"}, "holds T/0 twice"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "HumanEval.jsonl", ROW, ROW | {"task_id": "T/1"} | change)
    with pytest.raises(UsageError, match=message):
        read_problems(file)


def test_a_folder_without_the_file_is_said(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl", ROW)
    with pytest.raises(UsageError, match=r"holds no HumanEval.jsonl or HumanEval.jsonl.gz"):
        read_problems(tmp_path)


def test_holes_are_those_of_the_paper(problems: tuple[Problem, ...]) -> None:
    lines = [hole for problem in problems for hole in FORMS["single_line"].holes(problem, 0)]
    spans = [hole for problem in problems for hole in FORMS["random_span"].holes(problem, 0)]
    assert (len(lines), len(spans)) == (1033, 1640)
    for hole in lines + spans:
        assert hole.source(hole.middle) == hole.problem.prompt + hole.problem.canonical_solution
        assert hole.prefix.startswith(hole.problem.prompt)
    assert all("\n" not in hole.middle and hole.middle.strip() for hole in lines)
    assert all(hole.middle for hole in spans)
    assert len({hole.id for hole in lines + spans}) == 1033 + 1640
    again = list(FORMS["random_span"].holes(problems[0], 0))
    assert again == spans[:10]
    assert again != list(FORMS["random_span"].holes(problems[0], 1))
