"""``bench offline`` from its options to its files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo.cli.launch import _request
from npu_zoo.evaluation import machine
from npu_zoo.evaluation.offline.benchmark import OfflineBenchmark
from npu_zoo.evaluation.offline.mindie import COLUMNS
from npu_zoo.evaluation.offline.results import OfflineBody
from npu_zoo.evaluation.record import read_record

OFFLINE = ("bench", "offline", "--model", "deepseek_coder", "--hardware", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is measured with little work."""
    monkeypatch.setattr(machine, "READ_BYTES", 2**16)
    monkeypatch.setattr(machine, "MATRIX_SHAPES", ((16, 16, 16),))


def test_cases_become_tables_rows_and_a_record(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.cli.bench.offline_report.SECONDS_BETWEEN_LINES", 0)
    table, record = tmp_path / "results.csv", tmp_path / "results.json"
    arguments = ("--cases", "[[6,3],[8,4],[9999,9]]", "--batch", "1,2", "--csv", str(table), "--json", str(record))
    ran = cli(*OFFLINE, *arguments)
    assert ran.code == 1
    assert "[9999,9] x 2: 9999 + 9 tokens are more than the 2048" in ran.out.replace("\n  ", " ")
    assert "[8,4] x 2" in ran.out
    assert "measured in this run" in ran.out.replace("\n            ", " ")
    assert "large to small" in ran.err
    assert re.search(r"\[6,3\] x 2, round 1 of 1: [\d.]+ tokens/s, 0 s left", ran.err)
    assert max(map(len, ran.out.splitlines())) <= 80

    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    cases = [(1, 8, 4), (1, 6, 3), (2, 8, 4), (2, 6, 3)]
    assert [tuple(map(int, row[1:4])) for row in rows] == cases

    kept = read_record(record, "bench offline")
    body = OfflineBody.model_validate(kept.body)
    assert body.complete
    assert [(c.batch, c.input, c.output) for c in body.cases] == cases
    assert len(body.not_run) == 2
    assert kept.machine is not None
    assert kept.machine.bandwidth
    assert body.cases[0].prefill.bandwidth_share
    for case, row in zip(body.cases, rows, strict=True):
        sample = case.samples[0]
        assert float(row[4]) == pytest.approx(sample.steps[-1])
        assert float(row[9]) == pytest.approx(case.batch * case.output / sample.steps[-1])
        assert float(row[8]) == pytest.approx(case.batch * 1000 / float(row[7]))
    assert set(kept.figures) == {"non_first_token_tokens_per_s", "e2e_tokens_per_s"}


def test_ctrl_c_keeps_what_has_finished(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = OfflineBenchmark._measure, []

    def interrupted(self: OfflineBenchmark, case: object) -> object:
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, case)  # type: ignore[arg-type]

    monkeypatch.setattr(OfflineBenchmark, "_measure", interrupted)
    table, record = tmp_path / "results.csv", tmp_path / "results.json"
    ran = cli(*OFFLINE, "--cases", "[[8,4],[6,3]]", "--csv", str(table), "--json", str(record))
    assert ran.code == 130
    assert "interrupted; 1 of 2 case(s) have finished" in ran.err
    assert "[8,4] x 1" in ran.out
    assert len(table.read_text().splitlines()) == 2
    body = OfflineBody.model_validate(read_record(record).body)
    assert (len(body.cases), body.complete) == (1, False)


def test_a_machine_that_cannot_be_measured_leaves_the_times(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(machine, "matrix_peak", fail)
    record = tmp_path / "results.json"
    ran = cli(*OFFLINE, "--cases", "[6,3]", "--json", str(record))
    assert ran.code == 0
    assert "could not be measured, so no shares of it are told: RuntimeError: no such kernel" in ran.err
    assert "the machine was not measured" in ran.out
    kept = read_record(record)
    assert kept.machine is not None
    assert (kept.machine.bandwidth, kept.body["complete"]) == (None, True)


def test_cases_that_memory_does_not_hold_leave_the_others(cli: Callable) -> None:
    ran = cli(*OFFLINE, "--cases", "[[64,64],[8,4]]", "--block-size", "16", "--kv-cache-memory", "100KB")
    assert ran.code == 1
    assert "[8,4] x 1: prefill" in ran.err
    assert "[64,64] x 1: 64 + 64 tokens are more than the 48 of the longest sequence; [24,24] would fit" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cases", "[[8,-4]]"), "the entry [8, -4] holds -4"),
        (("--max-batch-under", "0"), "give milliseconds above 0"),
        (("--max-batch-under", "inf"), "give milliseconds above 0"),
        (("--max-batch-under", "5", "--batch", "4"), "leave --batch out"),
        (("--batch-limit", "4"), "goes with --max-batch-under"),
        (("--csv", __file__), "has other columns than MindIE's"),
        (("--json", __file__), "is no record"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(cli: Callable, options: tuple[str, ...], said: str) -> None:
    ran = cli(*OFFLINE, *options)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_nothing_to_run_starts_nothing(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.cli.bench.offline.loaded", None)
    ran = cli(*OFFLINE, "--cases", "[4000,1000]", "--max-batch-under", "5")
    assert ran.code == 1
    assert "[1638,410] would fit" in ran.out


def test_a_launcher_knows_how_many_ranks_it_takes() -> None:
    request = _request([*OFFLINE, "--tp", "2", "--batch", "2", "--seed", "7"])
    assert request is not None
    assert request.world_size == 2
