"""Help pages: plain, aligned, options grouped by panel, and no import of rich."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import typer.core

DEFAULT_PANEL = "Options"
Command = TypeVar("Command", bound=Callable[..., None])


def json_output(keys: Mapping[str, str]) -> Callable[[Command], Command]:
    """Document the keys of a command's ``--json``; ``a.b`` is b in an object, ``a[].b`` in objects of a list."""

    def decorate(function: Command) -> Command:
        function.json_keys = dict(keys)  # type: ignore[attr-defined]
        return function

    return decorate


def json_keys(command: Any) -> dict[str, str]:
    """What :func:`json_output` says of a parsed command; empty where it says nothing."""
    return dict(getattr(command.callback, "json_keys", {}))


def option_text(parameter: Any) -> str:
    """One option or argument as help shows it, such as ``--tp, --tensor-parallel-size N`` or ``--[no-]chat``."""
    if parameter.param_type_name == "argument":
        return f"[{parameter.metavar or parameter.name.upper()}]"
    if parameter.secondary_opts:
        return "--[no-]" + str(parameter.opts[0]).removeprefix("--")
    names = ", ".join(parameter.opts)
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'TEXT'}"


def panels(parameters: list[Any]) -> dict[str, list[tuple[str, str]]]:
    """Option texts with their help, by panel, in the order of declaration."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        if not getattr(parameter, "hidden", False):
            panel = getattr(parameter, "rich_help_panel", None) or DEFAULT_PANEL
            grouped.setdefault(panel, []).append((option_text(parameter), parameter.help or ""))
    return grouped


class _PanelMixin:
    """Writes a command's options panel by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write every panel as a definition list."""
        for panel, records in panels(self.get_params(ctx)).items():  # type: ignore[attr-defined]
            with formatter.section(panel):
                formatter.write_dl(records, col_max=34)
        if json_keys(self):
            with formatter.section("Keys of --json"):
                formatter.write_dl(list(json_keys(self).items()), col_max=34)
        if hasattr(self, "format_commands"):
            self.format_commands(ctx, formatter)


class ZooCommand(_PanelMixin, typer.core.TyperCommand):
    """A command with plain help."""


class ZooGroup(_PanelMixin, typer.core.TyperGroup):
    """A group with plain help."""
