"""Every error that npu-zoo raises on purpose.

The tree, with the exit code that the command line ends with::

    NpuZooError                 1
    ├── UsageError              2   the request itself is malformed
    │   ├── ConfigError         2   a configuration file, NPU_ZOO_* variable or option
    │   ├── PromptError         2   a prompt the model cannot take (empty, unknown token id, refused by the template)
    │   │   └── PromptLengthError   2   a prompt, or prompt and output asked for, longer than the model takes
    │   └── UnknownModelError   2   no family or variant of that name
    ├── UnsupportedError        3   the feature matrix refuses the request
    ├── HardwareError           4   the device or its software environment is missing or unfit
    ├── WeightsError            5   a checkpoint is missing, damaged or contradicts its model
    │   └── TokenizerError      5   the checkpoint's tokenizer is missing or does not round-trip
    ├── PluginError             6   a plugin cannot be loaded or broke a contract
    └── EngineError             1   the engine cannot go on
        └── WorkerError         1   a rank of a parallel run died, raised, hung or did not arrive

A message says what was asked, what exists, and what to do.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from npu_zoo.core.features import Verdict


class NpuZooError(Exception):
    """Base of all errors raised on purpose; the command line prints it as ``error: …``."""

    exit_code: ClassVar[int] = 1


class UsageError(NpuZooError):
    """The request is malformed."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is unknown or has the wrong form."""


class PromptError(UsageError):
    """A prompt that the model cannot take."""


class PromptLengthError(PromptError):
    """A prompt, or a prompt and the output that was asked for, is longer than the model takes."""


class UnknownModelError(UsageError):
    """No registered family or variant has the name that was asked for."""


class UnsupportedError(NpuZooError):
    """The feature matrix refuses the request; ``verdict`` holds every reason and the alternatives."""

    exit_code = 3

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.describe())
        self.verdict = verdict

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[Verdict]]:
        return type(self), (self.verdict,)


class HardwareError(NpuZooError):
    """The device or its software environment is missing or unfit."""

    exit_code = 4


class WeightsError(NpuZooError):
    """A checkpoint is missing, damaged or contradicts its model."""

    exit_code = 5


class TokenizerError(WeightsError):
    """The checkpoint's tokenizer is missing or does not round-trip."""


class PluginError(NpuZooError):
    """A plugin cannot be loaded or broke a contract."""

    exit_code = 6


class EngineError(NpuZooError):
    """The engine cannot go on."""


class WorkerError(EngineError):
    """A rank of a parallel run died, raised, hung or did not arrive.

    Attributes:
        rank: the first that failed; None where no single one is known.
        host: where it ran; empty where it is not known.
    """

    def __init__(self, message: str, rank: int | None = None, host: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host


def validation_lines(error: ValidationError, root: str = "") -> list[str]:
    """What pydantic found wrong, a line per field: ``FamilySpec.rows.0.world_size: world sizes start at 1``.

    Args:
        error: what pydantic raised.
        root: what a field's path begins with, such as the model's name.
    """
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in (root, *fault["loc"]) if part != "")
        given = fault["input"]
        shown = f", given {reprlib.repr(given)}" if isinstance(given, (str, int, float, type(None))) else ""
        lines.append((f"{path}: " if path else "") + validation_message(fault) + shown)
    return lines


def validation_message(fault: ErrorDetails) -> str:
    """One of pydantic's messages as part of a sentence, without what it puts before a validator's own."""
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message if message != fault["msg"] else message[:1].lower() + message[1:]
