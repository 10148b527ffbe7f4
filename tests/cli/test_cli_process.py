"""The program with the native engine and the bundled checkpoint, in processes of its own where they show more."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve

PROGRAM = str(Path(sys.executable).parent / "npu-zoo")
DEMO = ("--model", "deepseek_coder:demo", "--hardware", "cpu", "--dtype", "fp32")
SMALL = ("--kv-cache-memory", "64MiB", "--threads", "1")
SECONDS = 120


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def compute(pid: int, seconds: float) -> None:
    """Wait until a process has used its CPUs for some seconds, however busy the machine is."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    while sum(process.cpu_times()[:2]) < before + seconds:
        time.sleep(0.01)


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def test_fifty_prompts_of_a_file_give_fifty_completions(cli: Callable[..., Any], tmp_path: Path) -> None:
    prompts = [f"def function_{number}(x):" for number in range(50)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    arguments = ("--prompts-file", str(tmp_path / "prompts.txt"), "--max-tokens", "8", "--max-num-seqs", "7", "--json")
    ran = cli("run", *DEMO, *SMALL, *arguments)
    assert ran.code == 0, ran.err
    found = results(ran.out)
    assert [result["prompt"] for result in found] == prompts
    assert all(1 <= len(result["token_ids"]) <= 8 for result in found)
    assert all(result["finish_reason"] in ("stop", "length") for result in found)
    assert all(0 < result["timings"]["ttft_s"] <= result["timings"]["total_s"] for result in found)
    assert re.search(r"50 of 50 prompts, \d+ tokens in [\d.]+ s: [\d.]+ tokens/s", ran.err)


def test_a_first_run_without_prompt_and_weights_writes_code(cli: Callable[..., Any]) -> None:
    ran = cli("run", "--model", "deepseek_coder")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("def fibonacci(n):\n")
    assert len(ran.out) > len("def fibonacci(n):\n\n")
    assert "demo checkpoint" in ran.err
    assert "--weights DIR" in ran.err


def test_an_interrupt_prints_what_there_is_and_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"x{number} = " for number in range(40)))
    arguments = ("--prompts-file", str(tmp_path / "prompts.txt"), "--max-tokens", "300", "--ignore-eos", "--json")
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [PROGRAM, "run", *DEMO, *SMALL, *arguments, "--max-num-seqs", "2"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout as stdout:
        first = stdout.readline()
        compute(process.pid, 0.5)  # the next two prompts are under way, hundreds of tokens from their end
        process.send_signal(signal.SIGINT)
        rest = stdout.read()
    error = (tmp_path / "stderr").read_text()
    assert process.wait(timeout=SECONDS) == 130, error
    assert "Traceback" not in error
    found = results(first + rest)
    assert [result["index"] for result in found] == list(range(40))
    reasons = [result["finish_reason"] for result in found]
    assert reasons[0] == "length"
    assert "abort" in reasons
    assert any(result["text"] for result in found if result["finish_reason"] == "abort")
    assert "tokens/s" in error


TRAP = "from pathlib import Path\nPath({canary!r}).write_text(__name__)\n"
AUTO_MAP = {
    "AutoConfig": "modeling_trap.TrapConfig",
    "AutoModelForCausalLM": "modeling_trap.TrapForCausalLM",
    "AutoTokenizer": ["tokenization_trap.TrapTokenizer", "tokenization_trap.TrapTokenizerFast"],
}
TRAPS = ("modeling_trap.py", "tokenization_trap.py", "sitecustomize.py", "usercustomize.py", "conftest.py", "torch.py")


@pytest.fixture
def trapped(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint whose folder is full of code that leaves a file behind when it runs."""
    source = Path(resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu")).weights)
    weights, canary = tmp_path / "weights", tmp_path / "canary"
    shutil.copytree(source, weights)
    for name in TRAPS:
        (weights / name).write_text(TRAP.format(canary=str(canary)))
    for name in ("config.json", "tokenizer_config.json"):
        path = weights / name
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "auto_map": AUTO_MAP}))
    yield weights
    assert not canary.exists(), canary.read_text()


def test_code_in_a_weights_directory_never_runs(trapped: Path) -> None:
    request = ("--model", "deepseek_coder:custom", "--weights", str(trapped), "--hardware", "cpu")
    ran = run("run", *request, "--prompt", "def f(", "--max-tokens", "4", "--json", cwd=trapped)
    assert ran.returncode == 0, ran.stderr
    assert len(results(ran.stdout)[0]["token_ids"]) == 4
    assert run("explain", *request, cwd=trapped).returncode == 0
    assert run("check", *request, cwd=trapped).returncode == 0


def test_the_trap_of_the_test_above_works(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "sitecustomize.py").write_text(TRAP.format(canary=str(canary)))
    run("--version", PYTHONPATH=str(tmp_path))
    assert canary.read_text() == "sitecustomize"


# prompt_toolkit switches bracketed paste on while it reads a line, and off after it.
PROMPT = r"\x1b\[\?2004h[^>]*>"
PROMPT_GONE = r"\x1b\[\?2004l"


class Terminal:
    """The program at the far end of a pseudo-terminal of 80 columns."""

    # A new session makes the terminal the controlling one, so that Ctrl-C typed into it becomes SIGINT.
    START = (
        "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.argv[1], sys.argv[1:])\n"
    )

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        self.master, slave = os.openpty()
        environment = {
            **os.environ,
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "24",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(tmp_path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What came up to a match, which is taken off what has been seen."""
        deadline = time.monotonic() + SECONDS
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            assert self._read(), f"ended without {pattern!r}: {self.seen!r}"
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def wait_for_end(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=SECONDS)

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 1.0)
        if not ready:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments))
        return opened[-1]

    yield open_terminal
    for found in opened:
        found.close()


def test_a_conversation_at_a_terminal(terminal: Any, tmp_path: Path) -> None:
    chat = terminal("chat", *DEMO, *SMALL, "--ignore-eos", "--max-tokens", "1200")
    chat.wait_for("Ctrl-D ends")
    chat.wait_for(PROMPT)
    chat.type("/help\r")
    chat.wait_for("Ctrl-C stops an answer")
    chat.wait_for(PROMPT)
    chat.type("write a function\r")
    chat.wait_for(PROMPT_GONE)
    chat.wait_for(r"\S")
    chat.type("\x03")
    chat.wait_for(r"\(stopped\)")
    chat.wait_for(PROMPT)
    chat.type("half a line\x03")
    chat.wait_for(PROMPT)
    chat.type("/clear\r")
    chat.wait_for("the conversation is forgotten")
    chat.wait_for(PROMPT)
    chat.type("\x04")
    assert chat.wait_for_end() == 0
    assert "Traceback" not in chat.seen
    assert "write a function" in (tmp_path / "npu-zoo" / "chat-history").read_text()


def test_a_conversation_from_a_pipe(cli: Callable[..., Any]) -> None:
    options = ("--max-tokens", "8", "--temperature", "0")
    ran = cli("chat", *DEMO, *SMALL, *options, stdin="hello\n/exit\nnever\n")
    assert ran.code == 0, ran.err
    assert ran.out.strip()


def test_a_single_completion_streams_to_a_terminal(terminal: Any) -> None:
    ran = terminal("run", *DEMO, *SMALL, "--prompt", "def add(a, b):", "--max-tokens", "16", "--echo")
    ran.wait_for(r"def add\(a, b\):")
    ran.wait_for(r"16 tokens in [\d.]+ s")
    assert ran.wait_for_end() == 0
