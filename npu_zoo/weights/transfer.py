"""One file on its way from a hub into a directory: resumed, verified, and named at last."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Protocol

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.http_client import (
    FILE_TRIES,
    Backoff,
    HttpClient,
    StatusError,
    Stopped,
    TransientError,
    read_chunks,
)
from npu_zoo.weights.hub import Hub
from npu_zoo.weights.pull_journal import Journal
from npu_zoo.weights.remote_files import Listing, RemoteFile

HASH_TRIES = 2
READ_BYTES = 8 * 1024 * 1024


class DownloadProgress(Protocol):
    """What is told of a download while it runs, from several threads."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are there; fewer where it is negative, as a file was started anew."""

    def finish(self, file: RemoteFile) -> None:
        """A file is verified and has its name."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Content:
    """Bytes of a file as they come, counted and hashed."""

    def __init__(self, file: RemoteFile) -> None:
        self.size = 0
        self._due = file.sha256 or file.git_sha1
        if file.sha256:
            self._hash = hashlib.sha256()
        else:  # git's name of a content, which is a sha1, is all that the source gives
            self._hash = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def take(self, chunk: bytes) -> None:
        """Add the bytes that follow."""
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        """The hash of all bytes so far."""
        return self._hash.hexdigest()

    @property
    def is_due(self) -> bool:
        """Whether the bytes have the hash that the source gives; true where it gives none."""
        return self._due is None or self._due == self.digest


def holds(path: Path, file: RemoteFile) -> bool:
    """Whether a path is a file with the content that is due."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    content = Content(file)
    for chunk in _read_file(path):
        content.take(chunk)
    return content.is_due


class Transfer:
    """One file on its way into a directory.

    Args:
        file: what is due.
        journal: what the parts of an earlier download are parts of; it has adopted this file.
        listing: where the file is listed.
        directory: where it is to lie.
        hub, client: where it comes from.
        progress: told of every piece.
    """

    def __init__(
        self,
        file: RemoteFile,
        journal: Journal,
        *,
        listing: Listing,
        directory: Path,
        hub: Hub,
        client: HttpClient,
        progress: DownloadProgress,
    ) -> None:
        self._file = file
        self._target = directory / file.path
        self._repository = listing.repository
        self._name = f"{file.path} of {listing.repository}"
        self._hub = hub
        self._journal = journal
        self._part = journal.part(file)
        self._client = client
        self._progress = progress
        self._content = Content(file)

    def run(self) -> None:
        """Fetch what is missing, verify the whole, and give it its name.

        Raises:
            WeightsError: the file cannot be had, has another content than is due, or another file took its name.
            Stopped: another transfer failed.
            OSError: the disk.
        """
        self._read_part()
        for tries_left in reversed(range(HASH_TRIES)):
            self._fetch()
            if self._content.is_due:
                break
            fault = f"{self._name}: {self._file.identity} is due, {self._content.digest} has come; the part is deleted"
            self._start_anew()
            if not tries_left:
                raise WeightsError(f"{fault}; the source or something on the way to it changes the file")
            self._progress.note(f"{fault}, and the file started anew")
        self._part.touch()
        _publish(self._part, self._target)
        self._progress.finish(self._file)

    def _read_part(self) -> None:
        if self._part.exists():
            for chunk in _read_file(self._part):
                self._check_stop()
                self._content.take(chunk)

    def _fetch(self) -> None:
        backoff, furthest = Backoff(self._client.stop, FILE_TRIES), self._content.size
        while self._content.size < self._file.size:
            try:
                self._stream()
            except TransientError as error:
                if self._content.size > furthest:  # else a server that always starts anew would be asked for ever
                    backoff.reset()
                furthest = max(furthest, self._content.size)
                if backoff.failures:
                    self._progress.note(f"{self._name}: {error}; it is tried again")
                backoff.wait(TransientError(f"{self._name}: {error}", error.retry_after))

    def _stream(self) -> None:
        with self._open(self._range()) as response:
            self._check_answer(response)
            with self._part.open("ab") as part:
                for chunk in read_chunks(response):
                    self._check_stop()
                    if self._content.size + len(chunk) > self._file.size:
                        raise WeightsError(self._changed("sends more"))
                    part.write(chunk)
                    self._content.take(chunk)
                    self._progress.advance(len(chunk))
        if self._content.size < self._file.size:
            raise TransientError(f"the connection ended after {self._content.size} of {self._file.size} bytes")

    def _range(self) -> dict[str, str]:
        """Headers that ask for what is missing; without a hash the server must tell whether it fits what is there."""
        etag = self._journal.etag(self._file)
        if self._content.size and not (self._file.identity or etag):
            self._start_anew()
        if not self._content.size:
            return {}
        return {"Range": f"bytes={self._content.size}-", **({"If-Range": etag} if etag else {})}

    def _open(self, headers: dict[str, str]) -> HTTPResponse:
        try:
            return self._client.open(self._file.url, headers)
        except StatusError as error:
            if error.status == 416:  # what is there is not the beginning of what the server has
                self._start_anew()
                raise TransientError("the server does not have the part that is missing") from error
            raise self._hub.refusal(error, self._repository, f"file {self._file.path}") from error

    def _check_answer(self, response: HTTPResponse) -> None:
        """Take an answer for what it is: the rest of the file, the whole of it, or another one."""
        first, total = 0, response.headers.get("Content-Length", "")
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            first, total = (int(match[1]), match[2]) if match else (-1, "")
        if total.isdigit() and int(total) != self._file.size:
            raise WeightsError(self._changed(f"has {total}"))
        if first != self._content.size:
            if first:
                raise TransientError("the server answers with another part than was asked for")
            self._progress.note(f"{self._name}: the server sends it from the beginning; it is started anew")
            self._start_anew()
        if not self._file.identity:
            self._journal.keep_etag(self._file, response.headers.get("ETag", ""))

    def _changed(self, has: str) -> str:
        return (
            f"{self._name}: {self._hub.title} {has} bytes, where its listing says {self._file.size}; "
            "if the file was changed meanwhile, run the same command again"
        )

    def _start_anew(self) -> None:
        self._part.unlink(missing_ok=True)
        self._progress.advance(-self._content.size)
        self._content = Content(self._file)

    def _check_stop(self) -> None:
        if self._client.stop.is_set():
            raise Stopped


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def _publish(part: Path, target: Path) -> None:
    """Give a finished part its name, on the disk before it has it, and never over another file."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(part)
    except FileExistsError:
        raise _in_the_way(target) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _in_the_way(target) from None
        part.rename(target)
    part.unlink(missing_ok=True)


def _in_the_way(target: Path) -> WeightsError:
    return WeightsError(
        f"{target} came to be there during the download, which overwrites nothing; move it away and run the same "
        "command again"
    )
