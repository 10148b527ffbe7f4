"""A file of results that grows line by line, and goes on where an earlier process left it.

A line says itself what it is a result of, so nothing lies beside the file, and a finished file is only looked at. What
counts is what ends in a line feed: the torn line of a process that was killed is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import stat
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from npu_zoo.cli.prompt_formats import LineFormat
from npu_zoo.cli.results import json_line
from npu_zoo.cli.run_key import RunKey
from npu_zoo.core.errors import ConfigError, NpuZooError

SYNC_SECONDS = 1.0
"""A power failure costs what was finished in so long a time; the end of the process costs nothing."""


class ResultFile(AbstractContextManager["ResultFile"]):
    """Results of one run, of which no second process can add any meanwhile.

    Attributes:
        done: for each line of the input, whether its result is there.
        failed: how many of these are refusals.

    Args:
        total: how many lines the input has.
        form: the input's; it knows its own results.

    Raises:
        ConfigError: the file cannot be written, another process writes it, or it holds something else.
    """

    def __init__(self, path: Path, key: RunKey, total: int, form: LineFormat) -> None:
        self.path, self.key = path, key
        self.done = bytearray(total)
        self.failed = 0
        self._form = form
        self._synced = time.monotonic()
        self._file = _opened(path)
        try:
            self._end = self._read()
            self._file.truncate(self._end)
            self._file.seek(self._end)
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *exc_info: object) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error
        finally:
            self._file.close()

    @property
    def remaining(self) -> int:
        """How many results are still to come."""
        return self.done.count(0)

    def write(self, index: int, result: Mapping[str, Any], *, failed: bool) -> None:
        """Append the result of a line of the input.

        Raises:
            NpuZooError: it cannot be written; the file holds what was written before.
        """
        line = json_line(result).encode() + b"\n"
        try:
            _write_all(self._file, line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise self._cannot_write(error) from error
        self._end += len(line)
        self._mark(index, failed)

    def _mark(self, index: int, failed: bool) -> None:
        self.done[index] = 1
        self.failed += failed

    def _read(self) -> int:
        """Mark what is there; returns where its last whole line ends."""
        end = 0
        reader = io.BufferedReader(self._file)
        for number, raw in enumerate(reader, 1):
            if not raw.endswith(b"\n"):
                self._require_own_beginning(number, raw)
                break
            self._take(number, raw)
            end += len(raw)
        reader.detach()
        return end

    def _take(self, number: int, raw: bytes) -> None:
        try:
            place = self._form.place(json.loads(raw))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise self._foreign(number) from None
        if changes := self.key.changes(place.key):
            raise ConfigError(
                f"{self.path} holds results of another run: {changes}; repeat that run as it was, or name another "
                "file with --output"
            )
        if not 0 <= place.index < len(self.done) or self.done[place.index]:
            raise self._foreign(number)
        self._mark(place.index, place.failed)

    def _require_own_beginning(self, number: int, raw: bytes) -> None:
        """What is cut off is ours where it follows lines of ours, or is the beginning of a result."""
        opening = self._form.opening
        if number == 1 and raw.strip(b"\0") and not (raw.startswith(opening) or opening.startswith(raw)):
            raise self._foreign(number)

    def _foreign(self, number: int) -> ConfigError:
        if number == 1:
            return ConfigError(
                f"{self.path} exists, and holds no results of this command; name another file with --output, or "
                "delete it"
            )
        return ConfigError(
            f"{self.path}, line {number}: no result of this run, or one that is there already; delete the line, and "
            "run the same command again"
        )

    def _cannot_write(self, error: OSError) -> NpuZooError:
        return NpuZooError(
            f"cannot write {self.path}: {error.strerror or error}; {self.done.count(1)} of {len(self.done)} results "
            "are in it, and the same command goes on from there"
        )


def _write_all(file: io.FileIO, data: bytes) -> None:
    """All bytes; a full disk takes some of them before it fails."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _opened(path: Path) -> io.FileIO:
    """The file for reading and writing, locked; made where there is none."""
    try:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path} is no regular file; leave --output out to write to standard output")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another process writes {path}; wait for it, stop it, or name another file") from None
    except BaseException:
        file.close()
        raise
    return file
