"""``eval``: how well a model answers, and how two results differ."""

from __future__ import annotations

import typer

from npu_zoo.cli.evaluation.compare import compare
from npu_zoo.cli.help import ZooCommand, ZooGroup

group = typer.Typer(cls=ZooGroup, help="Measure accuracy and compare results.", rich_markup_mode=None)
group.command("compare", cls=ZooCommand)(compare)
