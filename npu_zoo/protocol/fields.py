"""What the models of requests are made of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from npu_zoo.protocol.errors import shorten

MAX_ITEMS = 8192
"""Most entries that are read of a list; what a request may have of each thing is less, and ProtocolLimits says it."""

MAX_TOKEN_IDS = 2**20
"""Most token ids that are read of a list."""

MAX_NAMES = 1024
"""Most entries that are read of an object whose names are free and whose values are checked."""

Item = TypeVar("Item")
Value = TypeVar("Value")


def _few_names(data: Any) -> Any:
    if isinstance(data, Mapping) and len(data) > MAX_NAMES:
        raise fault(f"must have at most {MAX_NAMES} entries, not {len(data)}")
    return data


class _FirstFault(FailFast):
    """Ends a list's reading at its first fault: a body can hold a million, and each costs a kilobyte."""

    __hash__ = object.__hash__  # alternatives of a union must have one


Items = Annotated[list[Item], _FirstFault(), Field(max_length=MAX_ITEMS)]
Names = Annotated[dict[str, Value], BeforeValidator(_few_names)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], _FirstFault(), Field(max_length=MAX_TOKEN_IDS)]


class RequestModel(BaseModel):
    """An object of a request: strict types, and no field that is not known.

    Attributes:
        instead: what to use in place of fields that other servers take.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    instead: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in data if name not in names), None) if isinstance(data, Mapping) else None
        if unknown is None:
            return data
        raise fault(f"is no known field; {cls._nearest(unknown, names)}", unknown)

    @classmethod
    def _nearest(cls, name: str, names: set[str]) -> str:
        if name in cls.instead:
            return cls.instead[name]
        near = difflib.get_close_matches(shorten(name), names, n=1, cutoff=0.5)
        return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(names))}"


def fault(sentence: str, field: str = "") -> PydanticCustomError:
    """What a validator raises.

    Args:
        sentence: what is wrong, to be read after the field's name.
        field: where it is, below what is validated.
    """
    # Braces would be taken for placeholders of the context.
    return PydanticCustomError("fault", "{sentence}", {"sentence": sentence, "field": field})


def form_of(value: Any, *, text: str = "<text>", items: str = "<items>") -> str | None:
    """The name of the alternative that a value is to be read as: a string, or a list."""
    return text if isinstance(value, str) else items if isinstance(value, list) else None
