"""Results in the CSV form of MindIE's performance tests, which people's spreadsheets expect."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.offline.results import CaseResult, mean
from npu_zoo.testing.files import write_whole

COLUMNS = (
    "Model",
    "Batchsize",
    "In_seq",
    "Out_seq",
    "Total time(s)",
    "Prefill all time(ms)",
    "Prefill average time(ms)",
    "Non-first token time(ms)",
    "Non-first token Throughput(Tokens/s)",
    "E2E Throughput(Tokens/s)",
    "Non-first token Throughput Average(Tokens/s)",
    "E2E Throughput Average(Tokens/s)",
)
_DIGITS = 10


def csv_rows(model: str, results: Sequence[CaseResult]) -> list[list[str]]:
    """A row for each result; as MindIE has it, the last one of each batch size has the averages over that size."""
    rows = [[model, *_values(result)] for result in results]
    for last in {result.batch: number for number, result in enumerate(results)}.values():
        rows[last][-2:] = _averages([result for result in results if result.batch == results[last].batch])
    return rows


def _values(result: CaseResult) -> Iterator[str]:
    yield from (str(number) for number in (result.batch, result.input, result.output))
    token_ms = (result.non_first_token_s or 0.0) * 1000
    times = (result.total_s, result.prefill_s * 1000, result.prefill_average_s * 1000, token_ms)
    yield from map(_number, (*times, result.non_first_token_throughput, result.e2e_throughput))
    yield from ("", "")


def _averages(results: Sequence[CaseResult]) -> list[str]:
    non_first = mean(result.non_first_token_throughput for result in results)
    return [_number(non_first), _number(mean(result.e2e_throughput for result in results))]


def _number(value: float) -> str:
    return str(round(value, _DIGITS))


class MindieCsv:
    """A CSV file to which a run's rows are added, and which is whole at any time.

    Rows that other runs have written stay. The file is written at once, so that one that cannot be is told early.

    Raises:
        UsageError: there is a file with other columns, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = ""
        self.write([])

    def write(self, rows: Sequence[Sequence[str]]) -> None:
        """Put the run's rows in the place of those that it wrote before."""
        before, own = self._read(), _lines(rows)
        found = before.rfind(self._own) if self._own else -1
        text = before[:found] + own + before[found + len(self._own) :] if found >= 0 else before + own
        try:
            write_whole(self.path.resolve(), text)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}; name another file") from None
        self._own = own

    def _read(self) -> str:
        """The file's text up to a line's end; the header where there is none yet."""
        try:
            text = self.path.read_text(encoding="utf-8-sig") if self.path.exists() else ""
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path} cannot be read as CSV: {error}; name another file") from None
        if not text.strip():
            return _lines([COLUMNS])
        if not _has_columns(text):
            raise UsageError(
                f"{self.path} has other columns than MindIE's, so no rows are added to it; name another file"
            )
        return text if text.endswith("\n") else text + "\n"


def _has_columns(text: str) -> bool:
    try:
        return tuple(next(csv.reader(io.StringIO(text)), ())) == COLUMNS
    except csv.Error:
        return False


def _lines(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
