"""Conversations and tools as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from npu_zoo.protocol.errors import describe
from npu_zoo.protocol.fields import Items, RequestModel, fault, form_of

_FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class TextPart(RequestModel):
    """A piece of a message's content; parts that are no text are refused by their type."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise fault(f"is {describe(kind)}, and this server takes text parts only", "type")
        return data


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Items[TextPart], Tag("<items>")],
    Discriminator(
        form_of, custom_error_type="content", custom_error_message="must be a string or a list of parts of type text"
    ),
]


class SystemMessage(RequestModel):
    """Instructions; ``developer`` is OpenAI's newer name of the role."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    """What a user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(RequestModel):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call that the model made; ``index`` is taken since streams bring it along, and says nothing."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class AssistantMessage(RequestModel):
    """An earlier answer. What else OpenAI's answers hold is taken and has no effect; reasoning leaves the history."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    reasoning_content: str | None = Field(None, description="Taken and left out of the prompt.")
    reasoning: str | None = Field(None, description="Taken and left out of the prompt.")
    refusal: str | None = Field(None, description="Taken and left out of the prompt.")
    annotations: Items[Any] | None = Field(None, description="No effect.")
    audio: None = Field(None, description="Must be null: this server takes text only.")
    function_call: None = Field(None, description="Must be null: use tool_calls.")

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise fault("is required where the message has no tool_calls", "content")
        return self


class ToolMessage(RequestModel):
    """What a call came to."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


_ROLES = {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>", "tool": "<tool>"}


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return _ROLES.get(role) if isinstance(role, str) else None


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="must be an object whose role is system, developer, user, assistant or tool",
    ),
]


class Function(RequestModel):
    """A function that the model may call.

    Attributes:
        parameters: a JSON schema of its arguments; none where it takes none.
    """

    name: str = Field(pattern=_FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="No effect; arguments always follow the schema where calls are required."
    )


class Tool(RequestModel):
    """A tool that the model may use; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    """A function, by name."""

    name: str = Field(pattern=_FUNCTION_NAME)


class NamedToolChoice(RequestModel):
    """The one function that is to be called."""

    type: Literal["function"]
    function: FunctionName


def _choice_form(value: Any) -> str | None:
    return "<mode>" if isinstance(value, str) else "<function>" if isinstance(value, (dict, NamedToolChoice)) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[NamedToolChoice, Tag("<function>")],
    Discriminator(
        _choice_form,
        custom_error_type="tool_choice",
        custom_error_message='must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
    ),
]


class JsonSchemaFormat(RequestModel):
    """A JSON schema that an answer follows."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = Field(None, description="No effect.")
    strict: bool | None = Field(None, description="No effect: answers follow the schema always.")


class ResponseFormat(RequestModel):
    """What an answer looks like: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault(f"is required with type json_schema and with no other; the type is {self.type}", "json_schema")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise fault("is required", "json_schema.schema")
        return self


def check_tool_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise a validator's fault for what a call came to where there was no such call before it."""
    called: dict[str | None, None] = {}
    for place, message in enumerate(messages):
        if not isinstance(message, ToolMessage):
            calls = (isinstance(message, AssistantMessage) and message.tool_calls) or ()
            called = dict.fromkeys(call.id for call in calls)
        elif not called:
            raise fault("is of role tool, and no message with tool_calls is before it", f"messages.{place}")
        elif None not in called and message.tool_call_id is not None and message.tool_call_id not in called:
            known = ", ".join(map(str, called))
            sentence = f"is {describe(message.tool_call_id)}, and the calls before it are {describe(known)}"
            raise fault(sentence, f"messages.{place}.tool_call_id")


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates read them: content as one string, calls with their arguments as text."""
    return [_template_message(message) for message in messages]


def _template_message(message: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    said["content"] = _text(message.content)
    if message.name is not None:
        said["name"] = message.name
    if isinstance(message, AssistantMessage) and message.tool_calls:
        said["content"] = said["content"] or None  # templates look for calls where there is no content
        said["tool_calls"] = [call.model_dump(exclude={"index"}, exclude_none=True) for call in message.tool_calls]
    if isinstance(message, ToolMessage) and message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    return said


def _text(content: str | list[TextPart] | None) -> str | None:
    return "\n".join(part.text for part in content) if isinstance(content, list) else content
