"""Processes that judge: what ends them between two claims, or keeps them from starting, is told and passed over."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import psutil
import pytest

from npu_zoo.testing.validation import processes
from npu_zoo.testing.validation.claims import Claim, Figures, Outcome, Subject
from npu_zoo.testing.validation.processes import Limits, judge
from npu_zoo.testing.validation.report import to_json


def claim(check: Callable[[], Figures], *arguments: object, text: str = "is so") -> Claim:
    return Claim("spec", Subject("orchid"), text, functools.partial(check, *arguments), apart=True)


def judged(claims: list[Claim], jobs: int = 1) -> list[Outcome]:
    found = dict(judge(claims, Limits(jobs, timeout=60)))
    return [found[number] for number in range(len(claims))]


def holds() -> Figures:
    return {"process": os.getpid()}


def end_later() -> Figures:
    threading.Timer(0.3, os._exit, [9]).start()
    return {}


def linger(marker: str) -> Figures:
    Path(marker).write_text("")
    time.sleep(600)
    return {}


def unsendable() -> Figures:
    return {"lock": threading.Lock()}  # type: ignore[dict-item]


def told(text: str) -> Figures:
    raise ValueError(text)


def threads_of_torch() -> Figures:
    import torch

    return {"threads": torch.get_num_threads()}


@pytest.mark.timeout(60)
def test_a_process_that_ends_between_claims_takes_no_claim_along() -> None:
    claims = [claim(end_later), *(claim(functools.partial(_slow, 0.2)) for _ in range(4))]
    statuses = [outcome.status for outcome in judged(claims)]
    assert statuses[0] == "holds"
    assert statuses.count("fails") <= 1  # the one that was being judged just then


def _slow(seconds: float) -> Figures:
    time.sleep(seconds)
    return {}


def test_what_a_broken_pool_leaves_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int] = []

    def breaking(waiting: Mapping[int, Claim], limits: Limits) -> Generator[tuple[int, Outcome], None, None]:
        pools.append(len(waiting))
        yield from itertools.islice(own(waiting, limits), 2)

    own = processes._judge_in_pool
    monkeypatch.setattr(processes, "_judge_in_pool", breaking)
    assert {outcome.status for outcome in judged([claim(holds) for _ in range(5)])} == {"holds"}
    assert pools == [5, 3, 1]


def test_processes_that_cannot_start_fail_the_claims_that_are_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "prepare", _unprepared)
    outcomes = judged([claim(holds), claim(holds)])
    assert {outcome.status for outcome in outcomes} == {"fails"}
    assert {outcome.message for outcome in outcomes} == {
        "it was not judged: processes end before they are given a claim, see what they say above"
    }
    assert "nothing is prepared" in capfd.readouterr().err


def _unprepared(memory: int | None, parent: int, heavy: bool) -> None:
    raise RuntimeError("nothing is prepared")


def test_what_does_not_travel_between_processes_fails_its_claim_alone() -> None:
    lock = threading.Lock()
    outcomes = judged([claim(lambda: {"lock": str(lock)}), claim(unsendable), claim(holds)])
    assert [outcome.status for outcome in outcomes] == ["fails", "fails", "holds"]
    assert all(outcome.message.startswith("it cannot be judged elsewhere: ") for outcome in outcomes[:2])


def test_more_jobs_than_memory_leave_each_what_torch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_memory", lambda: 1 << 28)
    assert [outcome.status for outcome in judged([claim(threads_of_torch)], jobs=1)] == ["holds"]
    assert Limits.of_machine().jobs == 1


def test_limits_are_those_of_the_machine_or_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_memory", lambda: 1 << 50)
    assert Limits.of_machine() == Limits(len(os.sched_getaffinity(0)), 300.0)
    assert Limits.of_machine(7, 2.5) == Limits(7, 2.5)


def test_one_job_ends_with_its_user_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    marker = tmp_path / "marker"
    outcomes = judge([claim(holds), claim(linger, str(marker))], Limits(1, timeout=60))
    _, first = next(outcomes)
    while not marker.exists():
        time.sleep(0.05)
    process = psutil.Process(int(first.figures["process"]))
    outcomes.close()  # type: ignore[attr-defined]
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    assert list(tmp_path.iterdir()) == [marker]
    assert "NPU_ZOO_SIMULATE" not in os.environ


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred\x00", "a\udc80b", "｜ begin"])
def test_every_message_comes_back_and_can_be_reported(text: str) -> None:
    (outcome,) = [claim(told, text).judge()]
    assert outcome.message == f"ValueError: {text}"
    assert to_json([outcome], "spec", complete=True).encode("utf-8")
