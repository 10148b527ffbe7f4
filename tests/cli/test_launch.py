"""``npu-zoo launch``: ranks as processes of their own, of a command that stands in for ``run``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ..parallel.namespaces import Host, two_hosts

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
SECONDS = 120
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from npu_zoo.api import hookimpl

FOLDER = Path(__file__).parent


@hookimpl
def register_commands(app):
    app.command("stand-in")(stand_in)


def stand_in(does: str, text: str = "") -> None:
    from npu_zoo.core.errors import WorkerError
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (FOLDER / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"results of {rank} of {size}: {text}", flush=True)
    print(f"a remark of {rank}", file=sys.stderr, flush=True)
    if does.startswith("supervise"):
        return supervise(rank, does, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    if does == "read":
        print(f"{rank} reads {sys.stdin.read()!r}", file=sys.stderr, flush=True)
    while does == "wait":
        time.sleep(0.1)
    if does == "fail" and rank == 0:
        raise WorkerError("rank 1 on node7 raised ValueError: a bad weight")
    if does == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while does in ("fail", "die") or (does == "fail_once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        if does == "fail_once" and rank == 1:
            raise WorkerError("the first start")
        time.sleep(0.1)


def supervise(rank, does, first_start):
    from npu_zoo.parallel.environment import LaunchEnvironment
    from npu_zoo.parallel.launched import LaunchedGroup, join_store, launched_link
    place = LaunchEnvironment.from_environ(os.environ)
    store = join_store(place, 60)
    if rank == 0:
        with LaunchedGroup(store, place) as group:
            group.wait_ready(60)
            group.check(wait=1.0 if does == "supervise_once" and not first_start else 600)
        return
    link = launched_link(store, place, timeout=60)
    with link.reporting():
        link.send_ready()
        if rank == 1 and first_start:
            if does == "supervise_a_kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bad weight")
        link.stopping.wait()
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "LOGLEVEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a plugin that adds the command; the ranks that were started leave their numbers there."""
    site = tmp_path / "site"
    info = site / "stand_in-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[npu_zoo]\nstand_in = stand_in_plugin\n")
    (site / "stand_in_plugin.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    yield site
    pids = [int(path.read_text()) for path in site.glob("pid-*")]
    try:
        assert wait_until(lambda: not any(map(alive, pids)), 15.0)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def started(site: Path, size: int) -> bool:
    return all((site / f"pid-{rank}").exists() and (site / f"pid-{rank}").read_text() for rank in range(size))


@contextlib.contextmanager
def launched(*arguments: str, host: Host | None = None, stdin: int = subprocess.DEVNULL) -> Iterator[Any]:
    command = [sys.executable, "-m", "npu_zoo", "launch", *arguments]
    with subprocess.Popen(
        command if host is None else host.command(*command),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def launch(*arguments: str, stdin: str | None = None) -> Ran:
    with launched(*arguments, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE) as process:
        out, err = process.communicate(stdin, timeout=SECONDS)
        return Ran(process.returncode, out, err)


def test_rank_0_s_results_and_every_remark_are_shown(site: Path) -> None:
    ran = launch("--nproc-per-node", "2", "--", "stand-in", "read", "--text", "$HOME $$ ${rank}", stdin="a prompt")
    assert ran.code == 0, ran.err
    assert ran.out == "results of 0 of 2: $HOME $$ ${rank}\n"
    remarks = ["0 reads 'a prompt'", "[rank 1] 1 reads ''", "[rank 1] a remark of 1", "a remark of 0"]
    assert sorted(ran.err.splitlines()) == remarks


def test_what_rank_0_tells_is_the_message(site: Path) -> None:
    ran = launch("--nproc-per-node", "2", "stand-in", "fail")
    assert ran.code == 1
    errors = [line for line in ran.err.splitlines() if "remark" not in line]
    assert errors == ["error: rank 1 on node7 raised ValueError: a bad weight"]


def test_a_rank_that_dies_is_named_where_rank_0_does_not(site: Path) -> None:
    ran = launch("--nproc-per-node", "2", "stand-in", "die")
    assert ran.code == 1
    errors = [line for line in ran.err.splitlines() if "remark" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank 1 on {HOST} was killed (SIGKILL), perhaps for memory")


@pytest.mark.long
def test_ranks_are_started_anew_as_often_as_is_asked(site: Path) -> None:
    ran = launch("--nproc-per-node", "2", "--max-restarts", "1", "stand-in", "fail_once")
    assert ran.code == 0, ran.err
    assert "[rank 1] error: the first start" in ran.err
    assert ran.out.count("results of 0 of 2") == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
)
def test_no_rank_outlives_the_launcher(site: Path, number: signal.Signals, code: int) -> None:
    with launched("--nproc-per-node", "2", "stand-in", "wait") as process:
        assert wait_until(lambda: started(site, 2))
        process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert "Traceback" not in err


@contextlib.contextmanager
def launched_on_two_hosts(arguments: Sequence[str], command: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    with two_hosts() as hosts, contextlib.ExitStack() as stack:
        common = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0].address]
        numbers = [["--node-rank", str(number)] if "--rdzv-id" not in arguments else [] for number in (0, 1)]
        yield tuple(
            stack.enter_context(launched(*common, *own, *arguments, "--", *command, host=host))
            for host, own in zip(hosts, numbers, strict=True)
        )


@pytest.mark.long  # two hosts run a model in tests/parallel/test_two_hosts.py
@pytest.mark.parametrize("arguments", [[], ["--rdzv-id", "mine"]])
def test_two_nodes_meet(site: Path, arguments: list[str]) -> None:
    with launched_on_two_hosts(arguments, ["stand-in", "read"]) as nodes:
        ran = [Ran(node.wait(SECONDS), node.stdout.read(), node.stderr.read()) for node in nodes]
    assert [node.code for node in ran] == [0, 0], ran
    assert "".join(node.out for node in ran) == "results of 0 of 2: \n"
    assert "[rank 1] a remark of 1" in "".join(node.err for node in ran)


@pytest.mark.long
def test_a_killed_rank_of_another_node_is_named_there(site: Path) -> None:
    with launched_on_two_hosts([], ["stand-in", "die"]) as (first, second):
        assert second.wait(SECONDS) == 1
        assert f"error: rank 1 on {HOST} was killed (SIGKILL)" in second.stderr.read()
        first.send_signal(signal.SIGTERM)
        assert first.wait(SECONDS) == 143


@pytest.mark.long
def test_supervision_spans_nodes(site: Path) -> None:
    with launched_on_two_hosts([], ["stand-in", "supervise_a_kill"]) as (first, second):
        assert second.wait(SECONDS) == 1
        assert first.wait(SECONDS) == 1
        assert f"error: rank 1 on {HOST} was killed (SIGKILL)" in second.stderr.read()
        errors = [line for line in first.stderr.read().splitlines() if "remark" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank 1 on {HOST} ended without a word")


@pytest.mark.long
def test_rank_0_tells_of_another_s_error_once(site: Path) -> None:
    ran = launch("--nproc-per-node", "3", "stand-in", "supervise")
    assert ran.code == 1
    told = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(f"error: rank 1 on {HOST} raised ValueError: a bad weight")


@pytest.mark.long
def test_a_restart_finds_its_own_rank_0(site: Path) -> None:
    ran = launch("--nproc-per-node", "2", "--max-restarts", "1", "stand-in", "supervise_once")
    assert ran.code == 0, ran.err
    assert f"error: rank 1 on {HOST} raised ValueError: a bad weight" in ran.err


@pytest.mark.long
def test_a_node_that_waits_for_others_can_be_interrupted(tmp_path: Path) -> None:
    arguments = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--nproc-per-node", "1", "list")
    with launched(*arguments) as process:
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) in (130, -signal.SIGINT)


def test_refusals(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("run", "--model", "deepseek_coder:demo", "--hardware", "cpu", "--tp", "2")
    two = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--node-rank", "0")
    uneven = cli("launch", "--nnodes", "3", "--", *run)
    assert uneven.code == 2
    assert "2 ranks cannot be spread evenly over 3 nodes" in uneven.err
    other = cli("launch", "--nproc-per-node", "3", "--", *run)
    assert "1 node(s) of 3 make 3 ranks, and the command takes 2" in other.err
    assert "give --nproc-per-node" in cli("launch", "list").err
    assert "give --master-addr" in cli("launch", "--nnodes", "2", "--", *run).err
    assert "numbered from 0 to 1" in cli("launch", "--nnodes", "2", "--node-rank", "2", "--", *run).err
    assert "there is no command 'walk'" in cli("launch", "walk").err
    assert "one is enough" in cli("launch", "launch", "run").err
    monkeypatch.setenv("MASTER_PORT", "many")
    assert "MASTER_PORT=many is no port" in cli("launch", *two, "--", *run).err
    monkeypatch.setenv("RANK", "0")
    nested = cli("launch", "--", *run)
    assert nested.code == 2
    assert "a launcher has started this process already (RANK); give it `npu-zoo run …` itself" in nested.err


def test_a_port_that_is_taken_is_refused_by_name(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        one = cli("launch", "--master-port", port, "--nproc-per-node", "2", "list")
        several = (
            "--nnodes",
            "2",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
            "--nproc-per-node",
            "1",
            "list",
        )
        two = cli("launch", *several)
        other = cli("launch", "--node-rank", "1", *several[:4], "--master-port", "0", *several[6:])
    assert (one.code, two.code, other.code) == (4, 4, 4)
    assert f"MASTER_PORT={port} is taken by" in one.err
    assert f"port {port}, where the nodes would meet, is taken by" in two.err
    assert f"(pid {os.getpid()})" in two.err
    assert "MASTER_PORT=0 is no port" in other.err


def test_ports_of_the_devices_are_looked_at_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ("run", "--model", "deepseek_coder:33b-base", "--hardware", "atlas_800i_a2", "--tp", "8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        monkeypatch.setenv("HCCL_HOST_SOCKET_PORT_RANGE", port)
        ran = cli("launch", "--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--", *request)
    assert ran.code == 4
    assert f"HCCL needs {port} (HCCL_HOST_SOCKET_PORT_RANGE), and port {port} is taken by" in ran.err


def test_help_needs_no_torch() -> None:
    program = """
import sys
from npu_zoo.cli import main
code = main(["launch", "--help"])
assert not {"torch", "torch_npu", "transformers"} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node" in done.stdout
