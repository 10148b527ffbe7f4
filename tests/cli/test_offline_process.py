"""``run --prompts-file`` in processes of its own, with the native engine, killed and interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams

PROGRAM = (sys.executable, "-m", "npu_zoo")
DEMO = ("--model", "deepseek_coder:demo", "--hardware", "cpu", "--dtype", "fp32")
SMALL = ("--kv-cache-memory", "64MiB", "--threads", "1", "--max-num-seqs", "3", "--ignore-eos")
SECONDS = 120
PROMPTS = [f"def function_{number}(x):" for number in range(24)]
LENGTHS = [10 + number * 7 % 50 for number in range(24)]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What each prompt gives by itself."""
    options: dict[str, Any] = {"hardware": "cpu", "dtype": "float32", "kv_cache_memory": "64MiB", "threads": 1}
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in LENGTHS]
    with LLM("deepseek_coder:demo", **options) as llm:
        return [llm.generate(p, s)[0].outputs[0].text for p, s in zip(PROMPTS, params, strict=True)]


def write_jsonl(path: Path) -> tuple[str, ...]:
    lines = [{"prompt": prompt, "max_tokens": length} for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("--prompts-file", str(path))


def write_batch(path: Path) -> tuple[str, ...]:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "deepseek_coder", "prompt": prompt, "max_tokens": length, "temperature": 0},
        }
        for number, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("--prompts-file", str(path), "--served-model-name", "deepseek_coder")


def read_results(path: Path) -> dict[int, str]:
    """Texts by the prompts' places; fails where a line is torn or a place is taken twice."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        body = result["response"]["body"]["choices"][0] if "response" in result else result
        index = int(result.get("custom_id", result.get("index")))
        assert index not in found
        found[index] = body["text"]
    return found


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [*PROGRAM, "run", *DEMO, *SMALL, *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("write", [write_jsonl, pytest.param(write_batch, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_gives_what_each_prompt_gives_alone(
    tmp_path: Path, alone: list[str], write: Callable[[Path], tuple[str, ...]]
) -> None:
    arguments = (*write(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out"))
    for lines in (1, 17):
        with start(*arguments) as process:
            wait_for_lines(tmp_path / "out", lines, process)
            process.kill()
    with (tmp_path / "out").open("ab") as file:
        file.write(b'{"in')
    with start(*arguments) as process:
        error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, error
    assert "24 succeeded, 0 failed" in error
    assert read_results(tmp_path / "out") == dict(enumerate(alone))


def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(tmp_path: Path, alone: list[str]) -> None:
    arguments = (*write_jsonl(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out"))
    with start(*arguments) as process:
        wait_for_lines(tmp_path / "out", 3, process)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    kept = read_results(tmp_path / "out")
    assert 3 <= len(kept) < 24
    assert f"{24 - len(kept)} of 24 lines are left; the same command goes on with them" in error
    with start(*arguments) as process:
        error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, error
    assert f"holds {len(kept)} of 24 results; going on with the other {24 - len(kept)}" in error
    assert read_results(tmp_path / "out") == dict(enumerate(alone))


def test_sigterm_keeps_what_is_finished(tmp_path: Path, alone: list[str]) -> None:
    arguments = (*write_jsonl(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out"))
    with start(*arguments) as process:
        wait_for_lines(tmp_path / "out", 2, process)
        process.terminate()
        error = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 143, error
    kept = read_results(tmp_path / "out")
    assert 2 <= len(kept) < 24
    assert kept == {index: alone[index] for index in kept}


@pytest.mark.long
def test_of_launched_ranks_the_first_alone_reads_and_writes(tmp_path: Path, alone: list[str]) -> None:
    lines = "".join(json.dumps({"prompt": prompt, "max_tokens": 4}) + "\n" for prompt in PROMPTS[:3])
    options = ("--tp", "2", "--prompts-file", "-", "--output", str(tmp_path / "out"))
    command = [*PROGRAM, "launch", "--nproc-per-node", "2", "run", *DEMO, *SMALL, *options]
    for _ in ("runs", "finds nothing left to do"):
        ran = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=SECONDS)
        assert ran.returncode == 0, ran.stderr
        assert "3 succeeded, 0 failed" in ran.stderr
    assert all(alone[index].startswith(text) for index, text in read_results(tmp_path / "out").items())
    assert len(read_results(tmp_path / "out")) == 3
