"""The pages on comparing and plotting results: their commands are taken, and what they say is what the code does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo.evaluation.comparison.divergence import MINDIE_RULE
from npu_zoo.evaluation.comparison.report import ComparisonBody
from npu_zoo.evaluation.plots.selection import PLOTTED

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("eval-compare", "bench-plots")}
COMMANDS = [line for page in PAGES.values() for line in re.findall(r"^    npu-zoo (.*)$", page, re.MULTILINE)]
OWN = [command for command in COMMANDS if not command.startswith("eval --")]


@pytest.mark.parametrize("command", OWN)
def test_the_commands_are_taken(command: str, accept: Callable[[list[str]], None]) -> None:
    accept(shlex.split(command))


def test_the_rule_is_the_one_that_is_applied() -> None:
    page = PAGES["eval-compare"]
    assert f"no position is above {MINDIE_RULE.largest:.0e}".replace("e-03", "e-3") in page
    assert f"at most {MINDIE_RULE.share:.1%} of all positions".replace("%", " %") in page
    assert f"are above {MINDIE_RULE.usual:.0e}".replace("e-04", "e-4") in page


def test_the_body_s_keys_are_listed() -> None:
    section = PAGES["eval-compare"].split("## The record")[1].split("##")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert keys == list(ComparisonBody.model_fields)


def test_every_kind_that_is_plotted_is_listed() -> None:
    table = PAGES["bench-plots"].split("| from | plot |")[1].split("\n\n")[0]
    assert {*re.findall(r"`(bench \w+)`", table)} == set(PLOTTED)
