"""``plugin``: the project of a new plugin, and the validation of one that is not installed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from npu_zoo.cli.help import ZooCommand, ZooGroup
from npu_zoo.cli.output import note
from npu_zoo.cli.plugin_project import Architecture, NewPlugin, check_name, write_project
from npu_zoo.cli.validate import (
    JobsOption,
    JsonFile,
    JunitFile,
    LevelName,
    LevelOption,
    MarkdownFile,
    ResumeFile,
    TimeoutOption,
    run_validation,
)
from npu_zoo.registry import get_registry

group = typer.Typer(cls=ZooGroup, help="Begin a plugin, and check one.", rich_markup_mode=None)


@group.command(cls=ZooCommand)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The family's name, such as my_family.")],
    architecture: Annotated[
        Architecture,
        typer.Option(
            "--architecture",
            metavar="KIND",
            help="What the model is made of: llama; moe, which has experts; mla, with latent attention too.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where to. Default: npu-zoo-NAME, in this folder.")
    ] = None,
) -> None:
    """Write the project of a new plugin, which passes its own tests. Nothing is overwritten."""
    check_name(name, get_registry())
    plugin = NewPlugin(name)
    directory = to or Path(plugin.distribution)
    files = write_project(plugin, architecture, directory)
    print(f"{directory} is written:")
    for file in files:
        print(f"  {file}")
    shown = shlex.quote(str(directory))
    print("next:")
    print(f"  pip install -e {shlex.quote(f'{directory.absolute()}[test]')}")
    print(f"  pytest {shown}")
    print(f"  npu-zoo validate --plugin {name} --level run")
    print(f"{directory / 'README.md'} says what to edit first")


@group.command(cls=ZooCommand)
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory with the plugin's pyproject.toml.")],
    level: LevelOption = LevelName.run,
    json: JsonFile = None,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    resume: ResumeFile = None,
    jobs: JobsOption = None,
    timeout: TimeoutOption = None,
) -> None:
    """Validate a plugin's directory without installing it.

    It is checked as `npu-zoo validate --plugin NAME` checks an installed one, and goes before an installed version of
    itself. The exit code is 0 where no claim fails.
    """
    from npu_zoo.uninstalled import installed_from, read_project

    project = read_project(directory)
    if project.installed_version is not None:
        note(f"{project.name} {project.installed_version} is installed; what is checked is {project.directory}")
    with installed_from(directory) as names:
        code = run_validation(
            names, level.value, json=json, junit=junit, markdown=markdown, resume=resume, jobs=jobs, timeout=timeout
        )
    raise typer.Exit(code)
