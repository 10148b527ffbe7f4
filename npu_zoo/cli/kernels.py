"""``kernels``: the compiled kernels for this machine's processor."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from npu_zoo.cli.help import ZooCommand, ZooGroup, json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import note, print_fields, print_json
from npu_zoo.compiled.build import build as build_library
from npu_zoo.compiled.library import CONDITION, find_compiler, library_path, obstacle
from npu_zoo.registry import get_registry

SHOW_KEYS: dict[str, str] = {
    "library": "Where the compiled library of this processor and this version lies.",
    "built": "Whether it is there.",
    "obstacle": "Why it cannot serve; null where it can.",
    "compiler": "The C++ compiler that builds it; null where there is none.",
    "kernels": "The kernels and attention backends that it serves.",
}
"""What ``kernels show --json`` writes."""

group = typer.Typer(cls=ZooGroup, no_args_is_help=True, help="The compiled kernels for this machine's processor.")


@group.command("build", cls=ZooCommand)
def build(
    force: Annotated[
        bool, typer.Option("--force", help="Compile them even where they are built, or where a build failed.")
    ] = False,
) -> None:
    """Compile the zoo's CPU kernels for this machine, once; it takes some seconds and a C++ compiler.

    Without this command the first run on a CPU does it in the background, and the next one uses them.
    """
    if not force and not obstacle():
        note(f"they are built already: {library_path()}")
        return
    started = time.monotonic()
    path = build_library(force=force)
    note(f"built in {time.monotonic() - started:.1f} s: {path}")


@group.command("show", cls=ZooCommand)
@json_output(SHOW_KEYS)
def show(as_json: JsonFlag = False) -> None:
    """Show whether they are built, what builds them, and what they compute."""
    registry = get_registry()
    kernels = [spec.name for spec in registry.kernels.values() if spec.condition == CONDITION]
    kernels += [spec.name for spec in registry.attention_backends.values() if spec.condition == CONDITION]
    found: dict[str, Any] = {
        "library": str(library_path()),
        "built": library_path().is_file(),
        "obstacle": obstacle() or None,
        "compiler": find_compiler(),
        "kernels": kernels,
    }
    if as_json:
        print_json(found)
        return
    shown = {name.replace("_", " "): value for name, value in found.items() if value is not None}
    print_fields({**shown, "built": "yes" if found["built"] else "no", "kernels": ", ".join(kernels)})
