"""Which tools a request offers, and the grammar of calls that it requires."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.model_config import ToolFormat
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.protocol.errors import ApiError, describe
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.messages import NamedToolChoice, Tool
from npu_zoo.protocol.requests import ChatCompletionRequest
from npu_zoo.protocol.structured import json_text, schema_text
from npu_zoo.protocol.tool_calls import ToolCallReader
from npu_zoo.registry import get_registry

_ARGUMENTS = "arguments_"  # a rule's name, before the tool's place
_FAULT_OF_SCHEMA = re.compile(r"at (?P<line>\d+)\(\d+\): failed to compile JSON schema: (?P<why>.*?)(?: \d+ \| .*)?$")
_ARGUMENTS_SPACE = r"\x20?"  # between JSON's tokens; nobody reads arguments
_ANSWER_SPACE = r"[\x20\x0A\x0D\x09]{0,32}"  # without an end a weak model writes nothing else


@dataclass(frozen=True)
class OfferedTools:
    """The tools of one request, as the model is told of them.

    Attributes:
        shown: as in OpenAI's API.
        required: places of those one of which has to be called; none where the model is free to call.
        parallel: whether an answer may hold several calls.
    """

    tool_format: ToolFormat
    shown: tuple[dict[str, Any], ...]
    required: tuple[int, ...]
    parallel: bool

    def new_reader(self) -> ToolCallReader:
        """What finds calls in an answer."""
        return ToolCallReader(self.tool_format, eager=bool(self.required), parallel=self.parallel)

    def form(self, answer: StructuredOutputs | None, limits: ProtocolLimits) -> StructuredOutputs | None:
        """What the output has to look like: calls where they are required; else the answer's form, or calls.

        Raises:
            ApiError: 400; a function's parameters take too much to describe, or the answer's form leaves no room for
                calls.
        """
        tools = {place: Tool.model_validate(tool) for place, tool in enumerate(self.shown)}
        if self.required:
            required = {place: tools[place] for place in self.required}
            rules = call_rules(self.tool_format, required, self.parallel, limits)
            return StructuredOutputs(grammar=f"start: calls\n{rules}")
        if answer is None:
            return None
        if answer.kind not in ("json", "json_object"):
            message = (
                f"structured_outputs.{answer.kind} leaves no room for tool calls; leave tools out, or use a schema"
            )
            raise ApiError(400, message, param="structured_outputs")
        rules = call_rules(self.tool_format, tools, self.parallel, limits)
        schema = json.loads(answer.json) if answer.json else {"type": "object"}
        return StructuredOutputs(grammar=f"start: calls | answer\nanswer: {_json_rule(schema, _ANSWER_SPACE)}\n{rules}")


def offered_tools(request: ChatCompletionRequest, config: EngineConfig, limits: ProtocolLimits) -> OfferedTools | None:
    """What a request offers; None where there are no tools, or ``tool_choice`` is none.

    Raises:
        ApiError: 400; the model has no format of tool calls, there are too many tools, two share a name, one's
            parameters are no schema of an object, or the chosen one is not among them.
    """
    if not request.tools or request.tool_choice == "none":
        return None
    shown = tuple(tool.model_dump(exclude_none=True) for tool in request.tools)
    limits.check_tools([json_text(tool, "tools") for tool in shown])
    names = [tool.function.name for tool in request.tools]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ApiError(400, f"tools has two functions of the name {twice}", param="tools")
    if config.tools is None:
        raise ApiError(400, _no_format(config), param="tools")
    for place, tool in enumerate(request.tools):
        _check_parameters(tool, place)
    parallel = request.parallel_tool_calls is not False
    return OfferedTools(config.tools, shown, _required(request, request.tools), parallel)


def call_rules(tool_format: ToolFormat, tools: Mapping[int, Tool], parallel: bool, limits: ProtocolLimits) -> str:
    """Rules of llguidance's Lark for ``calls``: one or more calls of these tools with arguments of their schemas.

    Args:
        tools: by their places in the request.
    """
    form = tool_format
    more = f" ({_literals(form.between)} call)*" if parallel else ""
    lines = [f"calls: {_literals(form.begin)} call{more} {_literals(form.end)}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in tools))
    for i, tool in tools.items():
        opening = _literals(form.call_begin + form.before_name + tool.function.name + form.before_arguments)
        lines.append(f"call_{i}: {opening} arguments_{i} {_literals(form.after_arguments + form.call_end)}")
        lines.append(f"{_ARGUMENTS}{i}: {_json_rule(_parameters(tool, i, limits), _ARGUMENTS_SPACE)}")
    return "\n".join(lines) + "\n"


def blamed_tool(form: StructuredOutputs, fault: str) -> tuple[str, str] | None:
    """The field of the schema that a grammar of :meth:`OfferedTools.form` cannot be compiled for, and why.

    Args:
        fault: what llguidance says of the grammar; it begins with a line's number.
    """
    found = _FAULT_OF_SCHEMA.match(fault)
    if found is None or form.grammar is None:
        return None
    rule = form.grammar.splitlines()[int(found["line"]) - 1].partition(":")[0]
    if not rule.startswith(_ARGUMENTS):
        return None
    return f"tools.{rule.removeprefix(_ARGUMENTS)}.function.parameters", found["why"]


def _literals(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _json_rule(schema: Any, white_space: str) -> str:
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": white_space}}
    return "%json " + json.dumps(schema, ensure_ascii=False)


def _parameters(tool: Tool, number: int, limits: ProtocolLimits) -> dict[str, Any]:
    field = f"tools.{number}.function.parameters"
    if not tool.function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = json.loads(schema_text(tool.function.parameters, field, limits))
    return {"type": "object", **schema}


def _check_parameters(tool: Tool, place: int) -> None:
    kind = (tool.function.parameters or {}).get("type", "object")
    if kind != "object":
        field = f"tools.{place}.function.parameters"
        raise ApiError(400, f"{field} must be the schema of an object, not of {describe(kind)}", param=field)


def _required(request: ChatCompletionRequest, tools: Sequence[Tool]) -> tuple[int, ...]:
    choice = request.tool_choice
    if not isinstance(choice, NamedToolChoice):
        return tuple(range(len(tools))) if choice == "required" else ()
    name = choice.function.name
    named = tuple(place for place, tool in enumerate(tools) if tool.function.name == name)
    if not named:
        known = ", ".join(tool.function.name for tool in tools)
        raise ApiError(400, f"tool_choice names {name}, which is not among the tools: {known}", param="tool_choice")
    return named


def _no_format(config: EngineConfig) -> str:
    family = get_registry().families.get(config.family)
    able = [f"{config.family}:{v.name}" for v in (family.variants if family else ()) if v.tools is not None]
    others = f"variants that have one: {', '.join(able)}" if able else "leave the tools out"
    return f"{config.model} has no format of tool calls; {others}"
