"""The root application: its commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, TypeVar

import typer
from typer.models import CommandInfo, TyperInfo

from npu_zoo import __version__
from npu_zoo.cli import (
    bench,
    chat,
    cite,
    config,
    convert,
    doctor,
    evaluation,
    explain,
    kernels,
    launch,
    matrix,
    plan,
    plugin,
    plugins,
    ports,
    pull,
    ranktable,
    run,
    serve,
    validate,
    weights,
)
from npu_zoo.cli.help import ZooCommand, ZooGroup
from npu_zoo.core.errors import NpuZooError
from npu_zoo.registry import get_registry

PROGRAM = "npu-zoo"
INTERRUPTED = 130
USAGE = 2

_GUARDED = ("validate", "plugin")
"""Commands that look at plugins which may end or hang what loads them, and so load them by themselves."""

Info = TypeVar("Info", CommandInfo, TyperInfo)


@dataclass
class GlobalOptions:
    """The options that stand before the command."""

    debug: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Run model families on Ascend NPUs and elsewhere, each checked against its feature matrix.

    `npu-zoo list` shows the families; `npu-zoo run --model FAMILY` runs one, with or without weights or an NPU.
    """
    if isinstance(context.obj, GlobalOptions):
        context.obj.debug = debug


def build_app() -> typer.Typer:
    """The application with the zoo's own commands."""
    app = typer.Typer(
        cls=ZooGroup, callback=_root, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
    )
    app.command("run", cls=ZooCommand)(run.run)
    app.command("chat", cls=ZooCommand)(chat.chat)
    app.command("serve", cls=ZooCommand)(serve.serve)
    app.command("launch", cls=ZooCommand, context_settings=launch.CONTEXT)(launch.launch)
    app.command("list", cls=ZooCommand)(matrix.list_models)
    app.command("matrix", cls=ZooCommand)(matrix.show_matrix)
    app.command("check", cls=ZooCommand)(matrix.check)
    app.command("pull", cls=ZooCommand)(pull.pull)
    app.command("convert", cls=ZooCommand)(convert.convert)
    app.command("explain", cls=ZooCommand)(explain.explain)
    app.command("plan", cls=ZooCommand)(plan.plan)
    app.command("doctor", cls=ZooCommand)(doctor.doctor)
    app.command("ports", cls=ZooCommand)(ports.ports)
    app.command("plugins", cls=ZooCommand)(plugins.plugins)
    app.command("validate", cls=ZooCommand)(validate.validate)
    app.command("cite", cls=ZooCommand)(cite.cite)
    app.add_typer(plugin.group, name="plugin")
    app.add_typer(ranktable.group, name="ranktable")
    app.add_typer(kernels.group, name="kernels")
    app.add_typer(weights.group, name="weights")
    app.add_typer(config.group, name="config")
    app.add_typer(bench.group, name="bench")
    app.add_typer(evaluation.group, name="eval")
    return app


def _with_plugins(app: typer.Typer) -> typer.Typer:
    """Add the plugins' commands; one that takes a name of the zoo's own or of an earlier plugin is left out."""
    taken = {*map(_name, app.registered_commands), *map(_name, app.registered_groups)}
    for record, added in get_registry().collect_commands(typer.Typer):
        if added.registered_callback is not None:
            _warn(f"plugin {record.name}: its app.callback() is left out: the root's options are the zoo's")
        commands = _unclaimed(record.name, added.registered_commands, taken)
        groups = _unclaimed(record.name, added.registered_groups, taken)
        app.registered_commands += commands
        app.registered_groups += groups
        if commands or groups:
            record.registered["register_commands"] = [*map(_name, commands), *map(_name, groups)]
    return app


def _unclaimed(plugin: str, added: list[Info], taken: set[str]) -> list[Info]:
    """Those whose name is not taken yet; their names are taken then."""
    kept = []
    for info in added:
        name = _name(info)
        if name in taken:
            _warn(f"plugin {plugin}: its command '{name}' is left out: the name is taken")
        else:
            taken.add(name)
            kept.append(info)
    return kept


def _name(info: CommandInfo | TyperInfo) -> str:
    if isinstance(info, TyperInfo):
        return str(info.name or "")
    return info.name or (info.callback.__name__ if info.callback else "").lower().replace("_", "-")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def run_app(arguments: list[str]) -> int:
    """Parse and run; every error becomes a message on stderr and an exit code."""
    options = GlobalOptions()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _invoke(arguments or ["--help"], options)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        text, code = _message(error)
        print(f"error: {text}", file=sys.stderr)
        return code


def find_command(name: str) -> Any:
    """A command as the parser has it, plugins' ones too; None where there is none of that name."""
    root: Any = typer.main.get_command(_with_plugins(build_app()))
    return root.commands.get(name)


def _invoke(arguments: list[str], options: GlobalOptions) -> int:
    named = next((argument for argument in arguments if not argument.startswith("-")), "")
    app = build_app() if named in _GUARDED else _with_plugins(build_app())
    command = typer.main.get_command(app)
    result = command.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=options)
    return result if isinstance(result, int) else 0


def _message(error: Exception) -> tuple[str, int]:
    """An error's text and exit code. Errors of the parser know how to format themselves."""
    if isinstance(error, NpuZooError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        hint = f"\n`{context.command_path} --help` shows the options" if context else ""
        return error.format_message() + hint, getattr(error, "exit_code", USAGE)
    hint = f"run `{PROGRAM} --debug …` for the traceback, and report it"
    return f"unexpected {type(error).__name__}: {error}\n{hint}", 1
