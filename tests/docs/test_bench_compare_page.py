"""docs/bench-compare.md: its commands are taken, its tables are the code's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from npu_zoo.evaluation.peers.cases import CATALOGUE
from npu_zoo.evaluation.peers.engines import ENGINES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bench-compare.md").read_text(encoding="utf-8")


def test_its_commands_are_taken(accept: Callable[[list[str]], None]) -> None:
    commands = re.findall(r"^    npu-zoo (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        accept(shlex.split(command))


def test_its_tables_name_every_engine_and_case() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert named == [*ENGINES, *CATALOGUE]
