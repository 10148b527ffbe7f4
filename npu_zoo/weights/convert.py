"""Runs a conversion: tensor by tensor, in bounded memory, with any number of threads, so that it can be resumed.

Every file of the result is laid out first, so each tensor's bytes have their place whatever the order in which they
come. A tensor is read, changed and written a stretch of rows at a time; what is done is kept in a journal beside the
files. All lies in a directory of another name, which gets the final one when everything is complete.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.convert_journal import Journal, UnitRecord
from npu_zoo.weights.manifest import write_result
from npu_zoo.weights.mapping import bytes_of
from npu_zoo.weights.plan import ConversionPlan
from npu_zoo.weights.quantize import quantize_rows
from npu_zoo.weights.reading import Digest, Piece, Reader
from npu_zoo.weights.tensors import LogicalTensor, Placement, Rows, Segments

BLOCK_BYTES = 2 << 20
"""Of the source, that are read at once where rows can be cut anywhere."""

MEMORY = 1 << 30
"""Bytes that all threads hold together, but for one tensor that is larger."""

_COPIES = 5
"""Copies of a stretch that are alive at most: as read, in float32, changed, encoded, and cut."""

_SPARE_DISK = 64 << 20

Progress = Callable[[int, int, int, int], None]
"""Called with tensors done, tensors in all, bytes written, bytes in all."""


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did.

    Attributes:
        tensors, bytes: in the result.
        resumed: tensors that an earlier run had written.
    """

    directory: Path
    tensors: int
    bytes: int
    resumed: int


def partial_directory(destination: Path) -> Path:
    """Where an unfinished result lies."""
    return destination.with_name(f".{destination.name}.partial")


def convert(
    plan: ConversionPlan, destination: Path, progress: Progress | None = None, threads: int | None = None
) -> ConversionResult:
    """Write the result, or go on with what an interrupted run has written.

    Args:
        destination: must not exist.
        threads: as many as there are processors, where unset.

    Raises:
        WeightsError: the destination exists or lies in the source, the disk is too small or full, a file is damaged, or
            another conversion's unfinished result is in the way.
        KeyboardInterrupt: the unfinished result can be gone on with.
    """
    _check_destination(plan, destination)
    work = partial_directory(destination)
    with Journal.open(work, plan.digest) as journal:
        resumed = len(journal.done)
        _check_disk(plan, work)
        segments = _lay_out(plan, work)
        with _Writer(work) as writer, Reader() as reader, _one_thread_each():
            journal.check(writer, segments)
            _run(_Conversion(plan, reader, writer, segments, journal), progress, threads)
            writer.sync()
        write_result(plan, work, journal.records())
        journal.remove()
    work.rename(destination)
    return ConversionResult(destination, len(plan.placed), plan.num_bytes, resumed)


def _check_destination(plan: ConversionPlan, destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise WeightsError(f"{destination} exists; delete it or name another directory")
    if not destination.parent.is_dir():
        raise WeightsError(f"{destination.parent} is no directory; make it first")
    source = plan.directory.resolve()
    if destination.parent.resolve().is_relative_to(source):
        raise WeightsError(f"{destination} lies in {plan.directory}, which is only read; name another place")


def _check_disk(plan: ConversionPlan, work: Path) -> None:
    present = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())
    needed, free = plan.num_bytes - present + _SPARE_DISK, shutil.disk_usage(work).free
    if needed > free:
        raise WeightsError(
            f"the result takes {plan.num_bytes / 1e9:,.1f} GB, and {work.parent} has {free / 1e9:,.1f} GB free; "
            "free some, or name a directory elsewhere"
        )


def _lay_out(plan: ConversionPlan, work: Path) -> dict[str, dict[str, Segments]]:
    """Every file with its headers, and the place of each stored tensor in it; what was written before is kept."""
    by_file: dict[str, list[Placement]] = {}
    for placements in plan.placed.values():
        for placement in placements:
            by_file.setdefault(placement.file, []).append(placement)
    found = {}
    for file, stored in by_file.items():
        path = work / file
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.new")
        found[file] = plan.target.lay_out(scratch, stored)
        if path.exists() and path.stat().st_size == scratch.stat().st_size:
            scratch.unlink()
        else:
            scratch.replace(path)
    return found


class _Writer:
    """Writes at any place of the files of a directory, from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write bytes at an offset.

        Raises:
            WeightsError: the disk is full, or the file cannot be written.
        """
        descriptor = self._open(file)
        try:
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise WeightsError(
                f"{self._folder / file}: {error.strerror or error}; make room and give the same command again: it goes "
                "on where it was"
            ) from error

    def read(self, file: str, size: int, offset: int) -> bytes:
        """Bytes of a file; fewer where it ends."""
        return os.pread(self._open(file), size, offset)

    def sync(self) -> None:
        """Bring everything to the disk."""
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._folder / file, os.O_RDWR)
            return self._files[file]


class _Budget:
    """Hands out memory; who asks for more than there is in all gets it once nobody else has any."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait for some bytes, and give them back."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


class _Conversion:
    """The tensors of a conversion, each by itself."""

    def __init__(
        self,
        plan: ConversionPlan,
        reader: Reader,
        writer: _Writer,
        segments: dict[str, dict[str, Segments]],
        journal: Journal,
    ) -> None:
        self.plan, self.journal = plan, journal
        self.stopped = threading.Event()
        self._reader, self._writer, self._segments = reader, writer, segments
        self._budget = _Budget(MEMORY)

    def run(self, name: str) -> None:
        """Read, change and write one tensor."""
        plan = self.plan
        tensor, result, placements = plan.source.tensors[name], plan.results[name], plan.placed[name]
        read = {piece: Digest() for piece in plan.source.pieces(name)}
        written: dict[Placement, Digest | None] = {placement: Digest() for placement in placements}
        if passes_through(tensor, result, tuple(read), placements):
            written = {placements[0]: None}  # the bytes are those that were read, and need not be hashed again
        size = self._rows_at_once(name, tensor, placements)
        for start in range(0, tensor.num_rows, size):
            if self.stopped.is_set():
                return
            stop = min(start + size, tensor.num_rows)
            with self._budget.hold((stop - start) * tensor.row_values * 4 * _COPIES):
                rows = change(plan.source.read(name, start, stop, self._reader, read), tensor, result)
                for placement in placements:
                    self._place(placement, rows, start, stop, written[placement])
        self.journal.add(
            UnitRecord(
                name,
                {(self._name_of(piece), piece.name): digest.hex() for piece, digest in read.items()},
                {(p.file, p.name): (digest or next(iter(read.values()))).hex() for p, digest in written.items()},
            )
        )

    def _name_of(self, piece: Piece) -> str:
        return piece.path.relative_to(self.plan.directory).as_posix()

    def _rows_at_once(self, name: str, tensor: LogicalTensor, placements: tuple[Placement, ...]) -> int:
        """All rows where a stored tensor is made of all of them; else about :data:`BLOCK_BYTES`."""
        if any(placement.takes == "all" for placement in placements):
            return max(1, tensor.num_rows)
        multiple = self.plan.source.row_multiple(name)
        wanted = BLOCK_BYTES // max(1, tensor.row_values * 4)
        return max(multiple, wanted // multiple * multiple)

    def _place(self, placement: Placement, rows: Rows, start: int, stop: int, digest: Digest | None) -> None:
        first, last = max(start, placement.rows[0]), min(stop, placement.rows[1])
        if first >= last or (placement.takes == "none" and start):
            return
        encoded = placement.encode(_cut(rows, first - start, last - start))
        data = bytes_of(encoded)
        if digest is not None:
            digest.update(data)
        skipped = (first - placement.rows[0]) * len(data) // (last - first) if placement.takes == "rows" else 0
        for offset, piece in _spread(self._segments[placement.file][placement.name], skipped, data):
            self._writer.write(placement.file, piece, offset)


def passes_through(
    tensor: LogicalTensor, result: LogicalTensor, pieces: tuple[Piece, ...], placements: tuple[Placement, ...]
) -> bool:
    """Whether a plain tensor is stored byte by byte as it was."""
    if tensor != result or tensor.scheme is not None or len(pieces) != 1 or len(placements) != 1:
        return False
    (piece,), (placement,) = pieces, placements
    return (piece.dtype, piece.shape) == (placement.dtype, placement.shape) and placement.takes == "rows"


def change(rows: Rows, tensor: LogicalTensor, result: LogicalTensor) -> Rows:
    """Rows of a tensor as the result has them: quantized, or in another dtype."""
    import torch

    dtype: torch.dtype = getattr(torch, result.dtype)
    if rows.scales is not None:
        return Rows(rows.values, rows.scales.to(dtype))
    if result.scheme is not None:
        return Rows(*quantize_rows(rows.values, result.scheme, dtype))
    return Rows(rows.values.to(dtype))


def _cut(rows: Rows, first: int, last: int) -> Rows:
    if rows.values.dim() == 0 or (first == 0 and last == len(rows.values)):
        return rows
    return Rows(rows.values[first:last], None if rows.scales is None else rows.scales[first:last])


def _spread(segments: Segments, skipped: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Data that begins after some bytes of a stored tensor, with the offset of each stretch of it."""
    for offset, length in segments:
        if skipped >= length:
            skipped -= length
            continue
        piece, data = data[: length - skipped], data[length - skipped :]
        if piece:
            yield offset + skipped, piece
        skipped = 0


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tensors are converted side by side; threads within one would only get into their way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(conversion: _Conversion, progress: Progress | None, threads: int | None) -> None:
    plan, journal = conversion.plan, conversion.journal
    sizes = {name: sum(p.num_bytes for p in placements) for name, placements in plan.placed.items()}
    waiting = [name for name in plan.placed if name not in journal.done]
    tensors, total = len(plan.placed) - len(waiting), sum(sizes.values())
    written = total - sum(sizes[name] for name in waiting)
    if progress is not None:
        progress(tensors, len(plan.placed), written, total)
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "convert") as pool:
        futures: dict[Future[None], str] = {pool.submit(conversion.run, name): name for name in waiting}
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                    tensors, written = tensors + 1, written + sizes[futures[future]]
                if progress is not None:
                    progress(tensors, len(plan.placed), written, total)
        except BaseException:
            conversion.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
