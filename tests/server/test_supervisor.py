"""Real servers of three processes with a stand-in front end, and what becomes of them when one is killed or stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from npu_zoo import LLM, SamplingParams

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENGINE = {"model": "deepseek_coder:demo", "hardware": "cpu", "dtype": "float32", "threads": 1}
ENGINE |= {"kv_cache_memory": "8MiB", "max_num_seqs": 16}
SECONDS = 60.0
"""How long anything may take on a machine that is busy."""

LONG = {"temperature": 0, "max_tokens": 1900, "ignore_eos": True}
ENOUGH = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PROMPT = [5, 6, 7]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(parent: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.add(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@contextmanager
def inherited(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    """What processes that are started meanwhile do with a signal, whatever this one was told, by nohup for one."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


class Server:
    """A server as its user sees it: a process, its words, and a port."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.faults = tmp_path / "faults"
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "NPU_ZOO_TEST_FAULTS": str(self.faults)}
        environ |= options.pop("environ", {})
        options = {**options, "engine": {**ENGINE, **options.get("engine", {})}}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "supervised.py"), json.dumps(options)],
            env={**environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stderr
        self.port = int(self.process.stdout.readline())
        streams = (self.process.stdout, self.process.stderr)
        self.threads = [threading.Thread(target=self.listen, args=(stream,)) for stream in streams]
        for thread in self.threads:
            thread.start()

    def listen(self, stream: IO[str]) -> None:
        with stream:
            self.said.extend(stream)

    def heard(self, text: str) -> bool:
        return any(text in line for line in list(self.said))

    def ask(self, **body: Any) -> Iterator[dict[str, Any]]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            connection.sendall(json.dumps(body).encode() + b"\n")
            with connection.makefile() as lines:
                yield from map(json.loads, lines)

    def look(self) -> dict[str, Any]:
        return next(self.ask(do="look"))

    def generate(self, name: str, params: dict[str, Any], prompt: list[int] = PROMPT) -> Iterator[dict[str, Any]]:
        return self.ask(do="generate", id=name, prompt=prompt, params=params)

    def wait_ready(self) -> dict[str, Any]:
        return wait_until(lambda: (found := self.look())["ready"] and found)

    def wait(self) -> int:
        code = self.process.wait(SECONDS)
        for thread in self.threads:
            thread.join()
        return code

    def end(self) -> None:
        self.process.kill()
        self.wait()


@contextmanager
def server_of(tmp_path: Path, **options: Any) -> Iterator[Server]:
    """A server that leaves no process behind."""
    server = Server(tmp_path, **options)
    try:
        yield server
    finally:
        children = children_of(server.process.pid)
        server.end()
        wait_until(lambda: not any(map(alive, children)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server_of(tmp_path_factory.mktemp("server")) as server:
        yield server


class Answer:
    """A request that runs in the background."""

    def __init__(self, states: Iterator[dict[str, Any]]) -> None:
        self.first = next(states)
        self.states = [self.first]
        self.thread = threading.Thread(target=lambda: self.states.extend(states))
        self.thread.start()

    @property
    def last(self) -> dict[str, Any]:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.states[-1]


def load(server: Server, count: int = 4, params: dict[str, Any] = LONG) -> list[Answer]:
    return [Answer(server.generate(f"load-{number}", params, [5, 6, 7 + number])) for number in range(count)]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[int]:
    return llm.generate([PROMPT], SamplingParams(**SHORT))[0].outputs[0].token_ids


def test_a_request_is_answered(server: Server, expected: list[int]) -> None:
    server.wait_ready()
    states = list(server.generate("one", SHORT))
    assert states[-1] == {"token_ids": expected, "finished": True}
    assert server.heard("loading loading weights")
    assert server.heard(f"ready {server.look()['engine']}")


def test_the_engine_is_killed_under_load(server: Server, expected: list[int]) -> None:
    before = server.wait_ready()
    answers = load(server)
    os.kill(before["engine"], signal.SIGKILL)
    assert [answer.last["error"] for answer in answers] == ["EngineDied"] * len(answers)
    after = wait_until(lambda: (found := server.look())["losses"] > before["losses"] and found["ready"] and found)
    assert after["engine"] != before["engine"]
    assert after["front_end"] == before["front_end"]
    assert after["stats"]["num_running"] == after["stats"]["kv_cache_usage"] == 0
    assert list(server.generate("after", SHORT))[-1]["token_ids"] == expected
    assert server.heard(f"the engine (pid {before['engine']}) was killed (SIGKILL)")


def test_requests_while_there_is_no_engine_fail_at_once(server: Server) -> None:
    before = server.wait_ready()
    os.kill(before["engine"], signal.SIGKILL)
    wait_until(lambda: not server.look()["ready"])
    assert next(server.generate("early", SHORT))["error"] == "EngineDied"
    server.wait_ready()


def test_the_front_end_is_killed_under_load(server: Server, expected: list[int]) -> None:
    before = server.wait_ready()
    answers = load(server)
    os.kill(before["front_end"], signal.SIGKILL)
    late = server.ask(do="look")  # nobody is there to accept it, and it is not refused
    for answer in answers:
        assert not answer.last["finished"]
    assert next(late)["front_end"] not in (before["front_end"], 0)
    after = server.wait_ready()
    assert after["engine"] == before["engine"]
    assert after["stats"]["num_running"] == after["stats"]["kv_cache_usage"] == 0
    assert list(server.generate("load-0", SHORT))[-1]["token_ids"] == expected


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    server.wait_ready()
    states = server.generate("left", LONG)
    next(states)
    assert server.look()["stats"]["kv_cache_usage"] > 0
    states.close()  # type: ignore[attr-defined]
    wait_until(lambda: server.look()["stats"]["kv_cache_usage"] == 0)


def test_a_stopped_front_end_does_not_stop_the_engine(server: Server, expected: list[int]) -> None:
    before = server.wait_ready()
    answers = load(server, 2, ENOUGH)
    os.kill(before["front_end"], signal.SIGSTOP)
    try:
        wait_until(lambda: idle(before["engine"]))
    finally:
        os.kill(before["front_end"], signal.SIGCONT)
    for answer in answers:
        assert answer.last["finished"]
        assert len(answer.last["token_ids"]) == ENOUGH["max_tokens"]
    assert server.look()["engine"] == before["engine"]


def idle(pid: int) -> bool:
    """Whether a process uses no CPU for a moment."""

    def used() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = used()
    time.sleep(0.3)
    return used() == before


def test_requests_that_the_engine_rejects_leave_the_others_alone(server: Server, expected: list[int]) -> None:
    server.wait_ready()
    [running] = load(server, 1, ENOUGH)
    too_long = next(server.generate("long", SHORT, [5] * 5000))
    assert too_long["error"] == "PromptLengthError"
    assert "5000" in too_long["message"].replace(",", "")
    assert next(server.generate("load-0", SHORT))["error"] == "UsageError"
    assert list(server.generate("fine", SHORT))[-1]["token_ids"] == expected
    assert running.last["finished"]


def test_an_engine_is_not_busy_without_requests(server: Server) -> None:
    wait_until(lambda: idle(server.wait_ready()["engine"]))
    assert idle(server.process.pid)


@pytest.mark.parametrize("moment", ["loading", pytest.param("generating", marks=pytest.mark.long)])
def test_nothing_outlives_the_supervisor(tmp_path: Path, moment: str) -> None:
    with server_of(tmp_path, engine={"tensor_parallel_size": 2}) as server:
        if moment == "generating":
            server.wait_ready()
            load(server, 2)
        else:
            wait_until(lambda: server.heard("loading loading weights"))
        found = descendants(server.process.pid)
        assert len(found) >= 3  # engine, rank, front end
        server.process.kill()
        wait_until(lambda: not any(map(alive, found)))


def descendants(pid: int) -> set[int]:
    found = children_of(pid)
    return found.union(*map(descendants, found))


def test_the_ranks_of_a_killed_engine_end_before_the_next_one_starts(tmp_path: Path) -> None:
    with server_of(tmp_path, engine={"tensor_parallel_size": 2}) as server:
        engine = server.wait_ready()["engine"]
        ranks = descendants(engine)
        assert ranks
        os.kill(engine, signal.SIGKILL)
        after = wait_until(lambda: (found := server.look())["losses"] and found["ready"] and found)
        assert not any(map(alive, ranks))
        assert descendants(after["engine"])


def test_a_rank_that_is_killed_ends_its_engine(tmp_path: Path) -> None:
    with server_of(tmp_path, engine={"tensor_parallel_size": 2}) as server:
        engine = server.wait_ready()["engine"]
        answers = load(server, 2)
        os.kill(max(descendants(engine)), signal.SIGKILL)
        assert {answer.last["error"] for answer in answers} == {"EngineDied"}
        wait_until(lambda: server.heard("failed: rank 1 on "))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGHUP])
def test_running_requests_may_finish(number: signal.Signals, tmp_path: Path) -> None:
    with inherited(number, signal.SIG_DFL), server_of(tmp_path) as server:
        server.wait_ready()
        answers = load(server, 2, ENOUGH)
        children = children_of(server.process.pid)
        server.process.send_signal(number)
        wait_until(lambda: server.heard(f"{number.name}: "))
        assert [answer.last["finished"] for answer in answers] == [True, True]
        assert server.wait() == 0
        assert not any(map(alive, children))
        assert [path.name for path in tmp_path.iterdir()] == []
        with pytest.raises(ConnectionRefusedError):
            server.look()


def test_a_server_that_was_started_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    with inherited(signal.SIGHUP, signal.SIG_IGN), server_of(tmp_path) as server:
        server.wait_ready()
        server.process.send_signal(signal.SIGHUP)
        assert list(server.generate("a", SHORT))[-1]["finished"]
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not server.heard("SIGHUP")


@pytest.mark.long  # with the real front end in test_drain.py, as are the next two
def test_a_request_while_the_server_drains_is_refused(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        server.wait_ready()
        running = server.generate("running", LONG)
        next(running)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: next(server.generate("late", SHORT)).get("error") == "Draining")
        assert not next(running)["finished"]
        running.close()  # type: ignore[attr-defined]
        assert server.wait() == 130


@pytest.mark.long
def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        server.wait_ready()
        answers = load(server, 1)
        children = children_of(server.process.pid)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: server.heard("SIGINT: "))
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130
        assert not answers[0].last["finished"]
        assert not any(map(alive, children))


@pytest.mark.long
def test_requests_beyond_the_grace_period_are_dropped(tmp_path: Path) -> None:
    with server_of(tmp_path, options={"grace_period": 0.05}) as server:
        server.wait_ready()
        answers = load(server, 4)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not any(answer.last.get("finished") for answer in answers)


def test_sigterm_while_the_engine_loads(tmp_path: Path) -> None:
    with server_of(tmp_path) as server:
        children = wait_until(lambda: children_of(server.process.pid))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not any(map(alive, children))


def damaged_checkpoint(llm: LLM, folder: Path) -> Path:
    folder.mkdir()
    for path in Path(llm.engine.config.weights).iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    return folder


def test_an_engine_that_cannot_start_says_why(llm: LLM, tmp_path: Path) -> None:
    weights = damaged_checkpoint(llm, tmp_path / "damaged")
    with server_of(tmp_path, changes={"weights": str(weights)}) as server:
        assert server.wait() == 5
    assert server.heard("error: ")
    assert server.heard("model.safetensors")
    assert not server.heard("Traceback")


FAULTY = {"engine_class": "stand_in_engines:FaultyEngine"}


def test_an_engine_that_raises_by_mistake_at_its_first_start_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("start raised")
    with server_of(tmp_path, changes=FAULTY) as server:
        assert server.wait() == 1
    assert server.heard("error: the engine: unexpected ValueError: the ninth layer is upside down")
    assert server.heard("Traceback")


@pytest.mark.parametrize("moment", [pytest.param("start", marks=pytest.mark.long), "step"])
def test_an_engine_that_dies_again_and_again_ends_the_server(tmp_path: Path, moment: str) -> None:
    with server_of(tmp_path, changes=FAULTY, policy={"max_deaths": 1}) as server:
        engine = server.wait_ready()["engine"]
        server.faults.write_text(f"{moment} {'killed' if moment == 'start' else 'raised'}")
        if moment == "start":
            os.kill(engine, signal.SIGKILL)
        else:
            assert next(server.generate("first", SHORT))["error"] == "EngineDied"
            wait_until(lambda: server.look()["losses"] == 1 and server.look()["ready"])
            assert next(server.generate("second", SHORT))["error"] == "EngineDied"
        assert server.wait() == 1
    assert server.heard("it is started again")
    assert server.heard("it ended 2 times without 60 s of service, so the server ends")
    if moment == "step":
        assert server.heard("the ninth layer is upside down; it ended 2 times")


def test_deaths_long_after_each_other_are_borne(tmp_path: Path) -> None:
    with server_of(tmp_path, policy={"max_deaths": 1, "healthy_seconds": 0.0}) as server:
        for losses in range(2):
            found = wait_until(lambda count=losses: (now := server.look())["losses"] == count and now["ready"] and now)
            os.kill(found["engine"], signal.SIGKILL)
        wait_until(lambda: server.look()["losses"] == 2 and server.look()["ready"])


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("raise_on_purpose", 2, "error: the file of keys is missing; give another one"),
        ("be_killed", 1, "it ended 3 times without 60 s of service, so the server ends"),
    ],
)
def test_a_front_end_that_cannot_start_ends_the_server(tmp_path: Path, fault: str, code: int, said: str) -> None:
    with server_of(tmp_path, front_end={"fault": fault}, policy={"max_deaths": 2}) as server:
        assert server.wait() == code
    assert server.heard(said)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_ranks_of_a_launcher_serve_and_end_together(tmp_path: Path, expected: list[int]) -> None:
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = {"engine": {**ENGINE, "tensor_parallel_size": 2}}
    environ = {**os.environ, **size, "PYTHONPATH": str(ROOT), "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
    command = [sys.executable, str(HERE / "supervised.py"), json.dumps(options)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        first = {**size, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
        with server_of(tmp_path, **options, environ=first) as server:
            engine = server.wait_ready()["engine"]
            assert list(server.generate("one", SHORT))[-1]["token_ids"] == expected
            os.kill(engine, signal.SIGKILL)
            assert server.wait() == 1
            assert server.heard("a launcher starts its ranks")
        said, _ = other.communicate(timeout=SECONDS)
        assert (other.returncode, said) == (1, b"")
