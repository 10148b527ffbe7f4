"""A rank that dies, hangs or raises ends the run within ten seconds, with one message, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import WorkerError
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.ports import port_users
from npu_zoo.testing.door import unchecked_config

FAULTS = "NPU_ZOO_TEST_FAULTS"
LONG = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9]]
SECONDS = 10.0
BUSY = 5.0  # the end of four processes on a machine that has two cores and other tests to run


def config_of(stages: int = 1, **options: object) -> EngineConfig:
    args = EngineArgs(
        model="deepseek_coder:demo", hardware="cpu", dtype="float32", tensor_parallel_size=2,
        pipeline_parallel_size=stages, **options,
    )  # fmt: skip
    return resolve(args)


def pids_of(llm: LLM) -> dict[int, int]:
    return dict(llm.engine.runner._workers.pids)  # type: ignore[attr-defined]


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def fail_while_generating(config: EngineConfig, fail: Callable[[LLM], None]) -> tuple[str, float]:
    """Generate, have something fail after some tokens; returns the message and the seconds from then to it."""
    llm = LLM.from_config(config)
    pids, port, moments = pids_of(llm), llm.engine.explain()["master_port"], []

    def on_output(output: RequestOutput) -> None:
        if not moments and len(output.outputs[0].token_ids) >= 3:
            fail(llm)
            moments.append(time.monotonic())

    try:
        with pytest.raises(WorkerError) as caught:
            llm.generate(PROMPTS, LONG, on_output=on_output)
        lasted = time.monotonic() - moments[0]
    finally:
        llm.shutdown()
    assert all(gone(pid) for pid in pids.values())
    assert os.getpid() not in [user.pid for user in port_users(port)]
    return str(caught.value), lasted


def kill(rank: int, number: signal.Signals) -> Callable[[LLM], None]:
    return lambda llm: os.kill(pids_of(llm)[rank], number)


def shared_memory() -> set[str]:
    """What lies there, without the semaphores that other programs' process pools make meanwhile."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if not path.name.startswith("sem.")} if folder.is_dir() else set()


@pytest.mark.parametrize("rank", [*(pytest.param(rank, marks=pytest.mark.long) for rank in (1, 2)), 3])
def test_a_rank_is_killed_while_generating(rank: int) -> None:
    before = shared_memory()
    message, lasted = fail_while_generating(config_of(stages=2), kill(rank, signal.SIGKILL))
    assert lasted < SECONDS + BUSY
    assert message.startswith(f"rank {rank} on {os.uname().nodename} was killed (SIGKILL)")
    assert shared_memory() <= before


@pytest.mark.long
def test_ranks_are_killed_again_and_again() -> None:
    clock = random.Random(7)
    for _ in range(50):
        rank, pause = clock.choice([1, 2, 3]), clock.random() / 5

        def fail(llm: LLM, rank: int = rank, pause: float = pause) -> None:
            time.sleep(pause)
            os.kill(pids_of(llm)[rank], signal.SIGKILL)

        message, lasted = fail_while_generating(config_of(stages=2), fail)
        assert lasted < SECONDS + BUSY
        assert message.startswith(f"rank {rank} ")


@pytest.mark.long
def test_a_stopped_rank_hangs() -> None:
    message, lasted = fail_while_generating(config_of(), kill(1, signal.SIGSTOP))
    assert lasted < SECONDS + BUSY
    assert message.startswith("rank 1 ")
    assert "no heartbeat" in message


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[str, float]]:
    """Run a model of which a rank fails in a way of the test's choice."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv(FAULTS, str(tmp_path / "faults"))

    def run(rank: int, kind: str, **options: object) -> tuple[str, float]:
        config = unchecked_config(config_of(**options), model_class="faulty_model:FaultyForCausalLM")
        return fail_while_generating(config, lambda llm: (tmp_path / "faults").write_text(f"{rank} {kind}"))  # type: ignore[arg-type, return-value]

    return run


@pytest.mark.parametrize(("rank", "stages"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_a_rank_that_raises_is_quoted(faulty: Callable[..., tuple[str, float]], rank: int, stages: int) -> None:
    message, lasted = faulty(rank, "raise", stages=stages)
    assert lasted < SECONDS + BUSY
    assert message.startswith(f"rank {rank} on {os.uname().nodename} raised ValueError: the ninth layer is upside down")


def test_a_rank_that_fails_to_load_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv(FAULTS, str(tmp_path / "faults"))
    (tmp_path / "faults").write_text("1 load")
    config = unchecked_config(config_of(), model_class="faulty_model:FaultyForCausalLM")
    with pytest.raises(WorkerError, match=r"rank 1 on .* raised ValueError: the first layer is missing"):
        LLM.from_config(config)


def test_a_rank_that_sleeps_hangs(faulty: Callable[..., tuple[str, float]]) -> None:
    message, lasted = faulty(1, "sleep")
    assert lasted < SECONDS + BUSY
    assert message.startswith("rank 1 ")
    assert "hangs" in message
    assert "faulty_model.py" in message


@pytest.mark.long
def test_a_collective_that_takes_too_long_names_who_is_missing(faulty: Callable[..., tuple[str, float]]) -> None:
    message, lasted = faulty(1, "spin", collective_timeout=3.0)
    assert lasted < SECONDS + BUSY
    assert "was not done within 3 s (--collective-timeout): rank 1 on " in message
    assert "did not come to it; it is at faulty_model.py" in message


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.ports import port_users
from npu_zoo.testing.door import unchecked_config
config = unchecked_config(
    resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu", tensor_parallel_size=2, collective_timeout=3.0)),
    model_class="faulty_model:FaultyForCausalLM",
)
llm = LLM.from_config(config)
print(*llm.engine.runner._workers.pids.values(), flush=True)
llm.generate([[5, 6]], SamplingParams(max_tokens=1900, ignore_eos=True))
"""


@pytest.mark.parametrize("kind", [pytest.param("sleep", marks=pytest.mark.long), "raise"])
def test_the_first_rank_fails(kind: str, tmp_path: Path) -> None:
    environ = {**os.environ, FAULTS: str(tmp_path / "faults")}
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, here], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        (tmp_path / "faults").write_text(f"0 {kind}")
        start = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode
    assert time.monotonic() - start < SECONDS + BUSY
    assert gone(pid)
    if kind == "raise":
        assert "the ninth layer is upside down" in err
    else:
        assert "rank 0 on " in err, err
        assert "did not come to it" in err, err
