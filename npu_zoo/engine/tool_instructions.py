"""Tells a model of its tools where its chat template does not."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import PromptError
from npu_zoo.core.model_config import ToolFormat

if TYPE_CHECKING:
    from jinja2 import Template


def with_instructions(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat
) -> list[Mapping[str, Any]]:
    """A conversation whose first system message ends with the format's instructions; without one, they are put first.

    Raises:
        PromptError: the instructions cannot be rendered for these tools.
    """
    text = render_instructions(tool_format, tools)
    place = next((i for i, message in enumerate(messages) if message.get("role") == "system"), None)
    if place is None:
        return [{"role": "system", "content": text}, *messages]
    system = messages[place]
    told = {**system, "content": "\n\n".join(filter(None, (system.get("content"), text)))}
    return [*messages[:place], told, *messages[place + 1 :]]


def render_instructions(tool_format: ToolFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    """What the format's template makes of the tools, in Jinja's sandbox; raises as :func:`with_instructions`."""
    import jinja2

    try:
        return str(_compiled(tool_format.instructions).render(tools=tools))
    except jinja2.TemplateError as error:
        raise PromptError(f"the tools cannot be put into the prompt: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(instructions: str) -> Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(instructions)
