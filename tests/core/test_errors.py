"""The exception tree and what the command line makes of it."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from npu_zoo import api
from npu_zoo.core import errors
from npu_zoo.core.features import Reason, Verdict

EXIT_CODES = {
    "NpuZooError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "PromptError": 2,
    "PromptLengthError": 2,
    "UnknownModelError": 2,
    "UnsupportedError": 3,
    "HardwareError": 4,
    "WeightsError": 5,
    "TokenizerError": 5,
    "PluginError": 6,
    "EngineError": 1,
    "WorkerError": 1,
}
CLASSES: dict[str, type[errors.NpuZooError]] = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and issubclass(found, errors.NpuZooError) and found.__module__ == errors.__name__
}


def drawn() -> dict[str, tuple[str, int]]:
    """The docstring's tree: every name with its parent and exit code."""
    tree: dict[str, tuple[str, int]] = {}
    path: list[str] = []
    for branch, name, code in re.findall(r"^( *[│├└─ ]*)(\w+Error) +(\d+)", errors.__doc__ or "", re.MULTILINE):
        depth = (len(branch) - 4) // 4
        path = [*path[:depth], name]
        tree[name] = (path[-2] if depth else "Exception", int(code))
    return tree


def test_the_docstring_draws_the_classes() -> None:
    assert drawn() == {name: (found.__mro__[1].__name__, found.exit_code) for name, found in CLASSES.items()}


def test_exit_codes() -> None:
    assert {name: found.exit_code for name, found in CLASSES.items()} == EXIT_CODES


def test_plugin_authors_get_every_error() -> None:
    assert {name: getattr(api, name, None) for name in CLASSES} == CLASSES


def refusal() -> Verdict:
    reason = Reason(axis="dtype", value="float16", supported=("bfloat16",), message="dtype=float16 is not supported")
    return Verdict(model="m", request={"dtype": "float16"}, supported=False, reasons=(reason,))


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"UnsupportedError"}))
def test_an_error_travels_between_processes(name: str) -> None:
    copy = pickle.loads(pickle.dumps(CLASSES[name]("what, and what to do")))
    assert (type(copy), str(copy)) == (CLASSES[name], "what, and what to do")


def test_a_worker_s_error_travels_with_its_rank() -> None:
    copy = pickle.loads(pickle.dumps(errors.WorkerError("rank 3 died", rank=3, host="node7")))
    assert (str(copy), copy.rank, copy.host) == ("rank 3 died", 3, "node7")


def test_a_refusal_travels_with_its_verdict() -> None:
    error = errors.UnsupportedError(refusal())
    copy = pickle.loads(pickle.dumps(error))
    assert copy.verdict == error.verdict
    assert str(copy) == "dtype=float16 is not supported"
