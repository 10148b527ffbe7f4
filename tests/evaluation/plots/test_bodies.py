"""What plots and comparisons read of a record's body is what the commands write into it."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from npu_zoo.evaluation.comparison import results
from npu_zoo.evaluation.plots import bodies

WRITTEN = [
    (bodies.OfflineBody, "npu_zoo.evaluation.offline.results", "OfflineBody"),
    (bodies.ServeBody, "npu_zoo.evaluation.serving.result", "ServeResult"),
    (bodies.PeersBody, "npu_zoo.evaluation.peers.result", "ComparisonBody"),
    (results._Body, "npu_zoo.evaluation.accuracy.report", "EvalBody"),
]


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models(part)


def missing(read: type[BaseModel], written: type[BaseModel]) -> Iterator[str]:
    for name, field in read.model_fields.items():
        if name not in written.model_fields:
            yield f"{written.__name__}.{name}"
            continue
        pairs = zip(models(field.annotation), models(written.model_fields[name].annotation), strict=True)
        for pair in pairs:
            yield from missing(*pair)


@pytest.mark.parametrize(("read", "module", "name"), WRITTEN, ids=lambda value: str(value))
def test_all_that_is_read_is_written(read: type[BaseModel], module: str, name: str) -> None:
    written = getattr(importlib.import_module(module), name)
    assert list(missing(read, written)) == []
