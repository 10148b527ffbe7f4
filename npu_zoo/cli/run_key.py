"""What tells one run over a file of prompts from another: its input, its model and its parameters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import fingerprints
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.sampling import SamplingParams

_DIGITS = 12
_TEXT = re.compile(rf"([0-9a-f]{{{_DIGITS}}})" * 3)
_CHANGED = {
    "input": "the input file has changed",
    "model": "the model, its weights, dtype or longest length are others",
    "parameters": "sampling parameters, --chat, structured output or --prompts-format are others",
}


@dataclass(frozen=True)
class RunKey:
    """Short digests of all that results depend on; how they are computed (batch, threads, ranks) is none of it."""

    input: str
    model: str
    parameters: str

    @classmethod
    def of(cls, input_digest: str, config: EngineConfig, parameters: Mapping[str, Any]) -> RunKey:
        """The key of a run.

        Args:
            input_digest: the SHA-256 of the input file.
            parameters: what was asked for beside the file, as plain data.
        """
        return cls(input_digest[:_DIGITS], _digest(_model_data(config)), _digest(parameters))

    @classmethod
    def parse(cls, text: str) -> RunKey:
        """The key of its text; a ValueError where it is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no key of a run")
        return cls(*match.groups())

    def __str__(self) -> str:
        return self.input + self.model + self.parameters

    def is_of(self, input_digest: str) -> bool:
        """Whether the input is that of a digest."""
        return input_digest.startswith(self.input)

    def changes(self, other: RunKey) -> str:
        """In words what the other one differs in; empty where in nothing."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return ", and ".join(_CHANGED[name] for name in names)


def sampling_data(params: SamplingParams) -> dict[str, Any]:
    """The sampling parameters that are not their defaults, as plain data."""
    found = {f.name: getattr(params, f.name) for f in fields(params) if getattr(params, f.name) != f.default}
    structured = params.structured_outputs
    return {**found, **({"structured_outputs": vars(structured)} if structured else {})}


def _model_data(config: EngineConfig) -> dict[str, Any]:
    names = ("model", "dtype", "quantization", "kv_cache_dtype", "seed", "max_model_len", "skip_tokenizer_init")
    return {**{name: getattr(config, name) for name in names}, "files": fingerprints(Path(config.weights))}


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGITS]
