"""``bench``: performance, measured."""

from __future__ import annotations

import typer

from npu_zoo.cli.bench import compare, offline, plot, serve
from npu_zoo.cli.help import ZooCommand, ZooGroup

group = typer.Typer(cls=ZooGroup, help="Measure performance.", rich_markup_mode=None, no_args_is_help=True)
group.command("offline", cls=ZooCommand)(offline.offline)
group.command("serve", cls=ZooCommand)(serve.serve)
group.command("compare", cls=ZooCommand)(compare.compare)
group.command("plot", cls=ZooCommand)(plot.plot)
