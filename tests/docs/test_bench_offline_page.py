"""The page on the benchmark without a server: commands are taken, forms are read, columns are the file's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from npu_zoo.cli.app import build_app, find_command
from npu_zoo.cli.bench.offline import DEFAULT_BATCH_LIMIT
from npu_zoo.evaluation.offline.cases import read_cases
from npu_zoo.evaluation.offline.mindie import COLUMNS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bench-offline.md").read_text(encoding="utf-8")


def rows(first_cell: str) -> list[str]:
    """The lines of the table whose header begins so."""
    table = PAGE.split(f"| {first_cell} |")[1].split("\n\n")[0]
    return [line for line in table.splitlines()[2:] if line.startswith("|")]


def test_its_commands_are_taken(accept: Callable[[list[str]], None]) -> None:
    commands = re.findall(r"^    npu-zoo (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        accept(shlex.split(command))


def test_its_forms_are_read() -> None:
    pairs, batches = (re.findall(r"`([\d\[\], ]+)`", row) for row in rows("option"))
    assert len(pairs) == 3
    assert len(batches) == 4
    for text in pairs:
        assert read_cases(text, "1").cases[0][:2] == (2048, 2048)
    for text in batches:
        assert read_cases(pairs[0], text).notes == ()


def test_its_columns_are_those_of_the_file() -> None:
    names = [row.split("|")[1].strip() for row in rows("column of `--csv`")]
    assert tuple(", ".join(names).split(", ")) == COLUMNS


def test_its_options_exist() -> None:
    known = {flag for option in find_command("bench").commands["offline"].params for flag in option.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert named <= known
    assert f"`--batch-limit` (default {DEFAULT_BATCH_LIMIT})" in PAGE
    assert "bench" in {group.name for group in build_app().registered_groups}
