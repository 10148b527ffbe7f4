"""What answers look like, as JSON schemas: for the OpenAPI document, and for tests that hold answers against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"


def reference(name: str) -> Schema:
    """A schema of the document, by its name."""
    return {"$ref": REFERENCE.format(model=name)}


def _object(properties: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object that has all of these properties, perhaps some of the optional ones, and no other."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": {**properties, **(optional or {})},
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_STOP_REASON = {"type": ["string", "integer", "null"]}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT}

_FUNCTION = _object({"name": _TEXT, "arguments": _TEXT})
_TOOL_CALL = _object({"id": _TEXT, "type": _one_of("function"), "function": _FUNCTION})
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_COUNT))}
_CHAT_LOGPROBS = _object(
    {"content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})), "refusal": {"type": "null"}}
)
_TEXT_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_or_null(_NUMBER)),
        "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
        "text_offset": _list(_COUNT),
    }
)
_LOGPROB = _object({"logprob": _NUMBER, "rank": {"type": "integer", "minimum": 1}, "decoded_token": _TEXT})
_PROMPT_LOGPROBS = _list(_or_null({"type": "object", "additionalProperties": _LOGPROB}))
_MESSAGE = _object(
    {"role": _one_of("assistant"), "content": _or_null(_TEXT)},
    {"reasoning_content": _or_null(_TEXT), "tool_calls": _list(_TOOL_CALL)},
)
_CHAT_CHOICE = _object(
    {
        "index": _COUNT,
        "message": _MESSAGE,
        "logprobs": _or_null(_CHAT_LOGPROBS),
        "finish_reason": _one_of("stop", "length", "tool_calls"),
        "stop_reason": _STOP_REASON,
    }
)
_TEXT_CHOICE = _object(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _or_null(_TEXT_LOGPROBS),
        "finish_reason": _one_of("stop", "length"),
        "stop_reason": _STOP_REASON,
    },
    {"prompt_logprobs": _PROMPT_LOGPROBS},
)

_PIECE_OF_CALL = _object(
    {"index": _COUNT, "function": _object({"arguments": _TEXT}, {"name": _TEXT})},
    {"id": _TEXT, "type": _one_of("function")},
)
_DELTA = _object(
    {},
    {
        "role": _one_of("assistant"),
        "content": _TEXT,
        "reasoning_content": _TEXT,
        "tool_calls": _list(_PIECE_OF_CALL),
    },
)
_CHAT_PIECE = _object(
    {
        "index": _COUNT,
        "delta": _DELTA,
        "logprobs": _or_null(_CHAT_LOGPROBS),
        "finish_reason": _or_null(_one_of("stop", "length", "tool_calls")),
    },
    {"stop_reason": _STOP_REASON},
)
_TEXT_PIECE = _object(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _or_null(_TEXT_LOGPROBS),
        "finish_reason": _or_null(_one_of("stop", "length")),
    },
    {"stop_reason": _STOP_REASON},
)

_ERROR = _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})

ANSWERS: Mapping[str, Schema] = {
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        },
        {"completion_tokens_details": _object({"reasoning_tokens": _COUNT})},
    ),
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": _one_of("chat.completion"),
            "choices": _list(_CHAT_CHOICE),
            "usage": reference("Usage"),
        },
        {"prompt_logprobs": _PROMPT_LOGPROBS},
    ),
    "ChatCompletionChunk": _object(
        {**_HEAD, "object": _one_of("chat.completion.chunk"), "choices": _list(_CHAT_PIECE)},
        {"usage": _or_null(reference("Usage"))},
    ),
    "Completion": _object(
        {
            **_HEAD,
            "object": _one_of("text_completion"),
            "choices": _list(_TEXT_CHOICE),
            "usage": reference("Usage"),
        }
    ),
    "CompletionChunk": _object(
        {**_HEAD, "object": _one_of("text_completion"), "choices": _list(_TEXT_PIECE)},
        {"usage": _or_null(reference("Usage"))},
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": _one_of("model"),
            "created": _COUNT,
            "owned_by": _TEXT,
            "root": _TEXT,
            "parent": {"type": "null"},
            "max_model_len": _COUNT,
        }
    ),
    "Models": _object({"object": _one_of("list"), "data": _list(reference("Model"))}),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT)}, {"token_strs": _list(_TEXT)}
    ),
    "DetokenizedText": _object({"prompt": _TEXT}),
    "Health": _object({"status": _one_of("ok", "starting", "draining")}),
    "Version": _object({"version": _TEXT}),
    "Error": _object({"error": _ERROR}),
    "SimpleError": _object({"error": _TEXT}),
}
"""By name."""
