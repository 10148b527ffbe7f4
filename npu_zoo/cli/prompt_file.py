"""A file of prompts that is read line by line, twice where it must be, and never held as a whole."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from npu_zoo.core.errors import UsageError

MAX_LINE_BYTES = 64 * 2**20
"""A line beyond this is no prompt; without a limit a file without line ends would be read as one."""


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
        index: its place among such lines, from 0.
        number: its place in the file, from 1.
    """

    index: int
    number: int
    text: str


class PromptFile(AbstractContextManager["PromptFile"]):
    """A UTF-8 file, with or without a byte order mark; ``-`` is standard input, which is kept on disk meanwhile.

    Attributes:
        name: what messages call it.
        blank: how many lines without text the last reading has skipped.
        digest: the SHA-256 of all bytes, once a reading has come to the end.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        standard = str(path) == "-"
        self.name = "standard input" if standard else str(path)
        self.blank = 0
        self.digest = ""
        try:
            self._file = _spooled() if standard else path.open("rb")
        except OSError as error:
            raise UsageError(f"cannot read {self.name}: {error.strerror or error}") from error

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def lines(self) -> Iterator[Line]:
        """Every line with text, from the beginning. Only a line feed ends a line: code may hold other separators.

        Raises:
            UsageError: a line is not UTF-8 or too long; says which.
        """
        self.blank = index = 0
        digest = hashlib.sha256()
        for number, raw in enumerate(self._raw_lines(), 1):
            digest.update(raw)
            text = self._decoded(raw, number).removesuffix("\n").removesuffix("\r")
            if text.strip():
                yield Line(index, number, text)
                index += 1
            else:
                self.blank += 1
        self.digest = digest.hexdigest()

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            self._file.seek(0)
            while raw := self._file.readline(MAX_LINE_BYTES + 1):
                yield raw
        except OSError as error:
            raise UsageError(f"cannot read {self.name}: {error.strerror or error}") from error

    def _decoded(self, raw: bytes, number: int) -> str:
        if len(raw) > MAX_LINE_BYTES:
            raise UsageError(f"{self.name}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; is it one a line?")
        try:
            return raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.name} is not UTF-8: line {number}: {error}") from error


def _spooled() -> IO[bytes]:
    file = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115  (the PromptFile closes it)
    # Not the text stream: what it decodes with depends on the locale.
    shutil.copyfileobj(sys.stdin.buffer, file)
    return file
