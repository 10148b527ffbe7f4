"""Downloads a repository's files into a directory: resumable, each verified before it gets its name.

What is not finished lies in the folder :data:`~npu_zoo.weights.remote_files.WORK_FOLDER` of the directory: a part per
file, and a journal that says what each part is the beginning of. Both survive any end of the process. A file that is
there already is never written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.weights.http_client import HttpClient, Stopped
from npu_zoo.weights.hub import open_hub
from npu_zoo.weights.pull_journal import Journal
from npu_zoo.weights.remote_files import WORK_FOLDER, Listing, RemoteFile
from npu_zoo.weights.transfer import DownloadProgress, Transfer, holds

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_STOP = 3.0


@dataclass(frozen=True)
class DownloadPlan:
    """What there is to do.

    Attributes:
        present: files that are in the directory already, with the right content.
        missing: files to download.
        resumed: bytes of them that parts of an earlier download hold.
        free: bytes that the file system has left.
    """

    listing: Listing
    directory: Path
    present: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    resumed: int
    free: int

    @property
    def size(self) -> int:
        """The bytes of all missing files."""
        return sum(file.size for file in self.missing)

    def check_disk(self) -> None:
        """Refuse a download that the file system has no room for.

        Raises:
            HardwareError: names what is needed and what is free.
        """
        needed = self.size - self.resumed
        if needed > self.free:
            raise HardwareError(
                f"{self.listing.repository} takes {needed:,} more bytes, and the file system of {self.directory} has "
                f"{self.free:,} free; make room, or name a directory on another one with --to DIR"
            )


def plan_download(
    listing: Listing,
    files: Sequence[RemoteFile],
    directory: Path,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> DownloadPlan:
    """Compare a directory with the files it is to hold; writes nothing.

    Raises:
        WeightsError: files are there with another content, or the directory cannot be read; every one is named.
    """
    try:
        present, different = _compare(files, directory)
        if different:
            raise WeightsError(
                f"{directory} holds files with another content than {listing.repository} has: {_some(different)}; "
                "nothing is overwritten: move them away, or name another directory with --to DIR"
            )
        missing = tuple(file for file in files if file not in present)
        journal = Journal.read(directory / WORK_FOLDER)
        resumed = sum(journal.resumable(file) for file in missing)
        return DownloadPlan(listing, directory, tuple(present), missing, resumed, free_bytes(_existing(directory)))
    except OSError as error:
        raise WeightsError(f"cannot read {directory}: {error.strerror or error}") from error


def download(plan: DownloadPlan, progress: DownloadProgress, jobs: int = 4, client: HttpClient | None = None) -> None:
    """Download what is missing; an interrupt or an error leaves a state that the next call goes on from.

    Args:
        plan: what there is to do.
        progress: told of every piece.
        jobs: files at a time.
        client: opens URLs; its ``stop`` ends the download.

    Raises:
        WeightsError: a file cannot be had, or has another content than the source says.
        HardwareError: the disk is full or refuses to be written, or another process downloads there.
    """
    hub = open_hub(plan.listing.source)
    client = client or HttpClient(hub.headers())
    new_transfer = functools.partial(
        Transfer, listing=plan.listing, directory=plan.directory, hub=hub, client=client, progress=progress
    )
    work = plan.directory / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            journal = Journal.read(work)
            for path in journal.adopt(plan.listing, plan.missing):
                progress.note(f"{path} is another file now than what an earlier download began; it is started anew")
            _run([new_transfer(file, journal) for file in plan.missing], jobs, client.stop)
            journal.remove()
    except Stopped:
        raise WeightsError(f"the download into {plan.directory} was stopped; the same call goes on with it") from None
    except OSError as error:
        raise _disk_error(error, plan.directory) from error


def _run(transfers: Sequence[Transfer], jobs: int, stop: threading.Event) -> None:
    """All transfers, some at a time; the first failure calls the others off."""
    waiting: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
    for transfer in transfers:
        waiting.put(transfer)
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                waiting.get_nowait().run()
            except queue.Empty:
                return
            except BaseException as error:
                failures.append(error)
                stop.set()

    # Daemons: a silent connection must not hold the end of the process up, and a part may end anywhere.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(transfers)))]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not stop.wait(SECONDS_BETWEEN_LOOKS):
            pass
    except BaseException:
        stop.set()
        raise
    finally:
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(SECONDS_TO_STOP / len(threads))
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        raise failure
    if stop.is_set():
        raise Stopped


def _compare(files: Sequence[RemoteFile], directory: Path) -> tuple[list[RemoteFile], list[str]]:
    """The files that are there, and the paths of those that are there with another content."""
    present, different = [], []
    for file in files:
        path = directory / file.path
        for folder in path.relative_to(directory).parents[:-1]:
            if (directory / folder).is_symlink():
                raise WeightsError(f"{directory / folder} is a link, and no file is written through it; replace it")
        if os.path.lexists(path):
            if holds(path, file):
                present.append(file)
            else:
                different.append(file.path)
    return present, different


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps other processes out; the lock goes with the process, however it ends."""
    path = work / "lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HardwareError(f"another process is downloading into {work.parent}; wait for its end") from None
        yield
        path.unlink()
    with contextlib.suppress(OSError):  # something else lies there, which is not ours to delete
        work.rmdir()


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _disk_error(error: OSError, directory: Path) -> HardwareError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HardwareError(f"no room is left in {directory}; make some and run the same command again, it goes on")
    return HardwareError(f"cannot write into {directory}: {error.strerror or error}")
