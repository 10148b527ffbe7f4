"""The process that tries whether forms of outputs can be compiled: ``python -m npu_zoo.server.form_process PARENT``.

A description of a few hundred bytes can ask for gigabytes or minutes, and the compiler has no limit that catches all of
them. Here the system sets the limits, and what meets them ends this process alone.

It reads its config, pickled, and then a form a line from standard input; it writes a line when it is ready, and then
one for each form.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs
from npu_zoo.engine.guidance import STACK_SIZE, GuideMaker
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.parallel.worker import die_with_parent

MAX_MEMORY = 512 * 2**20
"""Bytes that a form may take while it is compiled."""

MAX_CPU_S = 2
"""CPU seconds that it may take, rounded up."""


def main(arguments: Sequence[str]) -> int:
    """Answer until standard input ends."""
    die_with_parent(int(arguments[0]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(1), "wb") as answers, os.fdopen(0, "rb") as questions:
        os.dup2(2, 1)  # what a library prints is no answer
        guides = _guides(questions)
        _say_nothing_more()
        _limit_memory()
        _write(answers, None)
        for line in questions:
            _limit_time()
            _write(answers, _fault(guides, line))
    return 0


def _write(answers: BinaryIO, fault: str | None) -> None:
    answers.write(json.dumps(fault).encode() + b"\n")
    answers.flush()


def _guides(questions: BinaryIO) -> GuideMaker:
    config: EngineConfig = pickle.load(questions)
    guides = PromptEncoder(config).guides
    guides.check(StructuredOutputs(regex="a"))  # reads the vocabulary
    return guides


def _say_nothing_more() -> None:
    """A compiler without memory writes pages to standard error before it ends the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + STACK_SIZE + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _limit_time() -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + MAX_CPU_S, most))


def _fault(guides: GuideMaker, line: bytes) -> str | None:
    try:
        guides.check(StructuredOutputs(**json.loads(line)))
    except UsageError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
