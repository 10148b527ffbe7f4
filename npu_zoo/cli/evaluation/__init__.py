"""``eval``: accuracy of models, and how it differs between two."""

from __future__ import annotations

import typer

from npu_zoo.cli.evaluation.compare import compare
from npu_zoo.cli.evaluation.tasks import run_tasks
from npu_zoo.cli.help import ZooCommand, ZooGroup

group = typer.Typer(cls=ZooGroup, rich_markup_mode=None)
group.callback(invoke_without_command=True)(run_tasks)
group.command("compare", cls=ZooCommand)(compare)
