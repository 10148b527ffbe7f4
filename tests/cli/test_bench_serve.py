"""`npu-zoo bench serve`: what it refuses, shows, writes and ends with."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.evaluation.machine import describe_machine
from npu_zoo.evaluation.record import ResultRecord, read_record, write_record
from npu_zoo.evaluation.serving.figures import LevelFigures
from npu_zoo.evaluation.serving.result import ServeResult
from npu_zoo.testing.serving import RunningServer

from ..evaluation.serving.stub_server import Reply, Stub, completion, status, token

Cli = Callable[..., Any]
NOBODY = ("bench", "serve", "--url", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the load is --rate R"),
        (("--rate", "1", "--concurrency", "1"), "the load is --rate R"),
        (("--rate", "0"), "--rate takes requests per second"),
        (("--rate", "1,nan"), "--rate takes requests per second"),
        (("--rate", "1;2"), "--rate takes requests per second"),
        (("--concurrency", "1,0"), "--concurrency takes numbers of clients"),
        (("--concurrency", "1.5"), "--concurrency takes numbers of clients"),
        (("--concurrency", "1", "--arrival", "burst"), "--arrival: goes with --rate"),
        (("--rate", "1", "--arrival", "burst"), "--burst-size N"),
        (("--rate", "1", "--arrival", "burst", "--burst-size", "0"), "--burst-size 0"),
        (("--rate", "1", "--burst-size", "4"), "--burst-size goes with --arrival burst"),
        (("--rate", "1", "--burstiness", "0"), "--burstiness 0"),
        (("--rate", "1", "--arrival", "even"), "even"),
        (("--rate", "1", "--num-requests", "0"), "--num-requests 0"),
        (("--rate", "1", "--num-warmups", "-1"), "--num-warmups -1"),
        (("--rate", "1", "--duration", "nan"), "--duration nan"),
        (("--rate", "1", "--timeout", "0"), "--timeout 0"),
        (("--rate", "1,inf", "--duration", "10"), "give --num-requests N"),
        (("--rate", "1", "--random-input", "9..3"), "--random-input 9..3"),
        (("--rate", "1", "--random-output", "x"), "--random-output takes a length"),
        (("--rate", "1", "--dataset", "none", "--random-input", "3"), "--random-input: goes with random work"),
        (("--rate", "1", "--dataset", "none"), "cannot read none"),
        (("--rate", "1", "--endpoint", "chat", "--tokens", "ids"), "--endpoint completions alone"),
        (("--rate", "1", "--extra-body", "[]"), "--extra-body takes an object"),
        (("--rate", "1", "--goodput", "speed:9"), "--goodput takes times"),
        (("--rate", "1", "--url", "ftp://a"), "--url 'ftp://a' is no URL"),
        (("--rate", "1", "--json", "/"), "/ is no file"),
        (("--rate", "1", "--floor-dtype", "float32"), "--floor-dtype goes with --floor-model"),
        (("--rate", "1", "--floor-model", "gpt"), "gpt"),
        (("--rate", "1", "--url", "http://a.example", "--floor-model", "deepseek_coder"), "the server is on a.example"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(cli: Cli, options: tuple[str, ...], said: str) -> None:
    ran = cli(*NOBODY, *options)
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


def test_nobody_listens(cli: Cli) -> None:
    ran = cli(*NOBODY, "--rate", "1")
    assert ran.code == 1
    assert "127.0.0.1:1 gives no answer at /v1/models: the connection was refused" in ran.err


def test_without_aiohttp_the_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else found(name))
    ran = cli(*NOBODY, "--rate", "1")
    assert ran.code == 2
    assert "pip install 'npu-zoo[bench]'" in ran.err


def test_a_server_is_measured_and_recorded(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = describe_machine(threads=1).model_copy(update={"bandwidth": 1e10, "peak": 1e11})
    monkeypatch.setattr("npu_zoo.evaluation.machine.measure_apart", lambda config: machine)
    file = tmp_path / "record.json"
    arguments = ("--model", "deepseek_coder", "--threads", "1", "--log-level", "error")
    with RunningServer(arguments) as server:
        work = ("--random-input", "8..16", "--random-output", "4..8", "--num-requests", "6")
        ran = cli(
            "bench",
            "serve",
            "--url",
            server.url,
            "--rate",
            "20,40",
            *work,
            "--goodput",
            "ttft:60000",
            "--floor-model",
            "deepseek_coder",
            "--json",
            str(file),
        )
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "…" not in ran.out
    assert ran.out.startswith(f"deepseek_coder:demo at {server.url} (npu-zoo 0.1.0)\n")
    record = read_record(file, "bench serve")
    assert record.machine == machine
    assert record.arguments["rate"] == "20,40"
    result = ServeResult.model_validate(record.body)
    assert result.prompts == "ids"
    for level in result.levels:
        figures = level.figures
        assert (figures.completed, figures.failed) == (6, 0)
        assert figures.prompt_tokens == figures.asked_prompt_tokens
        assert figures.output_tokens == figures.asked_output_tokens
        assert figures.goodput is not None
        assert LevelFigures.of(level.requests, figures.goodput.goal) == figures
        assert f"{figures.request_throughput:.2f} 100%" in ran.out
        assert level.floor is not None
        assert level.floor.bandwidth_share == pytest.approx(level.floor.bytes / figures.seconds / 1e10)
        assert f"{level.floor.bandwidth_share:.1%}" in ran.out
    assert "shares of 10.0 GB/s read and 100 GFLOP/s, measured beforehand (1 threads)" in ran.out
    assert record.figures == result.headline()


def test_failures_are_shown_and_an_exit_code_says_that_there_was_nothing_else(cli: Cli) -> None:
    with Stub(completions=status(500, "Server Error", {"error": {"message": "\x1b[31mit broke"}})) as stub:
        ran = cli("bench", "serve", "--url", stub.url, "--concurrency", "2", "--num-requests", "3")
    assert ran.code == 1
    assert "it broke" in ran.out
    assert "\x1b" not in ran.out
    (row,) = [line for line in ran.out.splitlines() if "status" in line]
    assert row.split()[:3] == ["2", "status", "3"]


def test_the_key_comes_from_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    with Stub(completions=completion()) as stub:
        assert cli("bench", "serve", "--url", stub.url, "--concurrency", "1", "--num-requests", "1").code == 0
        monkeypatch.setenv("NPU_ZOO_API_KEY", "ours")
        assert cli("bench", "serve", "--url", stub.url, "--concurrency", "1", "--num-requests", "1").code == 0
    assert set(stub.keys) == {"Bearer theirs", "Bearer ours"}


def test_ctrl_c_keeps_what_was_measured(cli: Cli, tmp_path: Path) -> None:
    async def handle(reply: Reply) -> None:
        if len(stub.generations()) <= 6:
            await completion()(reply)
            return
        await reply.begin_stream()
        await reply.event(token())
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    file = tmp_path / "record.json"
    with Stub(completions=handle) as stub:
        before = signal.getsignal(signal.SIGINT)
        ran = cli("bench", "serve", "--url", stub.url, "--concurrency", "1", "--json", str(file))
        assert signal.getsignal(signal.SIGINT) == before
    assert ran.code == 130
    assert "interrupted" in ran.err
    (level,) = ServeResult.model_validate(read_record(file, "bench serve").body).levels
    counts = [level.figures.completed, level.figures.failed, level.figures.cancelled]
    assert counts[1:] == [0, 1]
    assert counts[0] >= 1


def test_ctrl_c_during_the_warm_up_leaves_an_earlier_record_as_it_was(cli: Cli, tmp_path: Path) -> None:
    async def handle(reply: Reply) -> None:
        if len(stub.generations()) <= 1:
            await completion()(reply)
            return
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    file = tmp_path / "record.json"
    write_record(ResultRecord(kind="bench serve", figures={"x": 1.0}), file)
    work = ("--num-warmups", "2", "--tokens", "ids", "--token-id-range", "1..9")
    with Stub(completions=handle) as stub:
        ran = cli("bench", "serve", "--url", stub.url, "--concurrency", "1", *work, "--json", str(file))
    assert (ran.code, ran.out) == (130, "")
    assert read_record(file).figures == {"x": 1.0}


def test_sigterm_keeps_the_levels_that_were_measured(cli: Cli, tmp_path: Path) -> None:
    async def handle(reply: Reply) -> None:
        if len(stub.generations()) <= 4:
            await completion()(reply)
            return
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    file = tmp_path / "record.json"
    work = ("--num-requests", "2", "--tokens", "ids", "--token-id-range", "1..9")
    with Stub(completions=handle) as stub, pytest.raises(SystemExit, match="143"):
        cli("bench", "serve", "--url", stub.url, "--concurrency", "1,2", *work, "--json", str(file))
    result = ServeResult.model_validate(read_record(file, "bench serve").body)
    assert [(level.name, level.figures.completed) for level in result.levels] == [("concurrency 1", 2)]
    assert result.interrupted


def test_ctrl_c_while_the_server_is_silent(cli: Cli) -> None:
    async def handle(reply: Reply) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    with Stub(models=handle) as stub:
        ran = cli("bench", "serve", "--url", stub.url, "--concurrency", "1")
    assert ran.code == 130
    assert ran.out == ""
