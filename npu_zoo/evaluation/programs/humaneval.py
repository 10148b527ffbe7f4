"""HumanEval (arXiv:2107.03374) and HumanEval+ (arXiv:2305.01210): their problems, and how answers are tested."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.accuracy.local_data import Row, data_files, read_rows
from npu_zoo.evaluation.accuracy.sources import file_digest
from npu_zoo.evaluation.programs.sandbox import Program

_TEXTS = ("task_id", "prompt", "entry_point", "canonical_solution")

_COMPARISON = """
from json import loads

def close(got, due, tolerance):
    return got == due or (got != got and due != due) or abs(got - due) <= tolerance + 1e-7 * abs(due)

def floats(value):
    items = value if isinstance(value, (list, tuple)) else [value]
    return bool(items) and all(isinstance(item, float) for item in items)

def agree(got, due, tolerance):
    if got == due:
        return True
    tolerance = tolerance or (1e-6 if floats(due) else 0)
    if not tolerance:
        return False
    if not isinstance(due, (list, tuple)):
        return close(got, due, tolerance)
    return len(got) == len(due) and all(close(*pair, tolerance) for pair in zip(got, due))

module = {{}}
exec({reference!r}, module)
reference = module[{entry_point!r}]
texts = {texts!r}
inputs = [loads(text) for text in texts]
answers = [{answer} for text in texts]

def check(candidate):
    for text, arguments, due in zip(texts, inputs, answers):
        got = candidate(*arguments)
        assert {verdict}, text[:200]
"""
_EQUAL = ("reference(*loads(text))", "agree(got, due, {tolerance!r})")
_ROOT = ("loads(text)", "abs(module['poly'](*due, got)) <= {tolerance!r}")
_ROOT_FINDERS = ("find_zero",)
"""Entry points whose answer is any root of the polynomial that they are given."""


@dataclass(frozen=True)
class Problem:
    """A function to write.

    Attributes:
        task_id: such as ``HumanEval/0``.
        prompt: imports, perhaps functions that it may use, its signature and its docstring.
        canonical_solution: a body that is right.
        tests: source that defines ``check(candidate)``, which raises where the candidate is wrong. It stands by itself:
            it begins with the canonical program, whose other functions it may use.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    tests: str

    def program(self, source: str) -> Program:
        """A program that is said to hold the function, with the tests."""
        return Program(source, self.tests, self.entry_point)


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a file, and the file's SHA-256."""

    file: Path
    sha256: str
    problems: tuple[Problem, ...]


def read_problems(data: Path, name: str = "HumanEval") -> ProblemSet:
    """Read HumanEval.jsonl or HumanEvalPlus.jsonl, perhaps compressed.

    Where rows have ``plus_input``, as those of HumanEval+ do, an answer is tested on ``base_input`` and on those,
    against what the canonical solution gives, as EvalPlus does it.

    Args:
        data: the file, or a folder with a file whose name begins with ``name.jsonl``.

    Raises:
        UsageError: it cannot be read, or a row lacks a field or has one of the wrong form; names the row.
    """
    file = _file_of(data, name)
    rows = read_rows(file)
    problems = tuple(_problem(f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    ids = [problem.task_id for problem in problems]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice:
        raise UsageError(f"{file} holds {twice} twice")
    return ProblemSet(file, file_digest(file), problems)


def _file_of(data: Path, name: str) -> Path:
    if not data.is_dir():
        return data
    found = [file for file in data_files(data) if file.name.startswith(f"{name}.jsonl")]
    if not found:
        raise UsageError(f"--data {data} holds no {name}.jsonl or {name}.jsonl.gz; name the file itself")
    return found[0]


def _problem(where: str, row: Row) -> Problem:
    for name in _TEXTS:
        if not isinstance(row.get(name), str):
            raise UsageError(f"{where}: {name} is {_given(row, name)}; a text is due")
    if not str(row["entry_point"]).isidentifier():
        raise UsageError(f"{where}: entry_point {row['entry_point']!r} is no function's name")
    return Problem(**{name: row[name] for name in _TEXTS}, tests=_tests(where, row))


def _tests(where: str, row: Row) -> str:
    if "plus_input" in row:
        return _comparison(where, row)
    if not isinstance(row.get("test"), str):
        raise UsageError(f"{where}: test is {_given(row, 'test')}; a text is due, or base_input and plus_input")
    return f"exec({_canonical(row)!r})\n{row['test']}"


def _canonical(row: Row) -> str:
    return f"{row['prompt']}{row['canonical_solution']}"


def _comparison(where: str, row: Row) -> str:
    arguments: list[Any] = []
    for name in ("base_input", "plus_input"):
        given = row.get(name)
        if not isinstance(given, list) or not all(isinstance(one, list) for one in given):
            raise UsageError(f"{where}: {name} is {_given(row, name)}; a list of lists of arguments is due")
        arguments += given
    tolerance = row.get("atol", 0)
    if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool):
        raise UsageError(f"{where}: atol is {_given(row, 'atol')}; a number is due")
    answer, verdict = _ROOT if row["entry_point"] in _ROOT_FINDERS else _EQUAL
    return _COMPARISON.format(
        reference=_canonical(row),
        entry_point=row["entry_point"],
        texts=[json.dumps(one) for one in arguments],
        answer=answer,
        verdict=verdict.format(tolerance=tolerance),
    )


def _given(row: Row, name: str) -> str:
    return f"of type {type(row[name]).__name__}" if name in row else "missing"
