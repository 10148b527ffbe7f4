"""What the models of requests are made of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


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
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
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
