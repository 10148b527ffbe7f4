"""``config show``: what all layers together ask for, and where each value came from."""

from __future__ import annotations

import json
from typing import Any

import typer

from npu_zoo.cli.help import ZooCommand, ZooGroup
from npu_zoo.cli.options import JsonFlag, request_options
from npu_zoo.cli.output import print_json
from npu_zoo.settings import Settings

group = typer.Typer(cls=ZooGroup, help="Show the configuration.", rich_markup_mode=None)


@group.command(cls=ZooCommand)
@request_options(engine=True, sampling={})
def show(
    settings: Settings,
    origin: bool = typer.Option(False, "--origin", help="Tell where each value came from."),
    as_json: JsonFlag = False,
) -> None:
    """Show the settings after all layers: defaults < file < environment < options.

    The output is a configuration file in YAML; null is unset.
    """
    values = settings.args.model_dump(mode="json")
    if as_json:
        shown: dict[str, Any] = {"settings": values, "sampling": dict(settings.sampling)}
        print_json({**shown, "origins": dict(settings.origins)} if origin else shown)
        return
    lines = [(f"{key}: {_yaml(value)}", settings.origins[key]) for key, value in values.items()]
    if settings.sampling:
        lines.append(("sampling:", ""))
        lines += [(f"  {k}: {_yaml(v)}", settings.origins[f"sampling.{k}"]) for k, v in settings.sampling.items()]
    width = max(len(text) for text, _ in lines)
    for text, where in lines:
        print(f"{text:<{width}}  # {where}" if origin and where else text)


def _yaml(value: Any) -> str:
    """A scalar or list, as YAML reads JSON; plain words without quotes."""
    plain = isinstance(value, str) and value.replace("_", "").isalnum() and not value[0].isdigit()
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return value if plain and value.lower() not in words else json.dumps(value, ensure_ascii=False)
