"""``bench serve``: the load generator for any server of OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.bench.serve_floor import FloorOptions, measure_floor, with_floors
from npu_zoo.cli.bench.serve_options import (
    ArrivalName,
    EndpointName,
    TokensName,
    api_key,
    parse_length_range,
    parse_loads,
    parse_token_ids,
)
from npu_zoo.cli.bench.serve_progress import ServeProgress
from npu_zoo.cli.bench.serve_tables import print_result
from npu_zoo.cli.output import note
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.serving.arrivals import Load, OpenLoop
from npu_zoo.evaluation.serving.figures import Goal
from npu_zoo.evaluation.serving.requests import parse_extra_body
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.protocol.server_address import ServerAddress

if TYPE_CHECKING:
    from npu_zoo.core.config import EngineConfig
    from npu_zoo.evaluation.record import Kind, Machine
    from npu_zoo.evaluation.serving.measuring import ServePlan
    from npu_zoo.evaluation.serving.result import ServeResult

KIND: Kind = "bench serve"
FAILED = 1
INTERRUPTED = 130
DEFAULT_REQUESTS = 100


def _option(help_text: str, flag: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=help_text, metavar=metavar, rich_help_panel=panel)


_LOAD, _WORK, _FLOORS, _RESULT = "Load", "Work", "Floor", "Result"
_RATE = "Open loop: requests a second, sent whatever the server does; several make a level each; inf sends all at once."
_CONCURRENCY = "Closed loop: clients that each wait for an answer before they send again; several make a level each."
_ARRIVAL = "poisson, or burst: several at once at even times. Default: poisson."
_BURSTINESS = "Shape of the gamma distribution of times between requests; below 1 they clump. Default: 1, Poisson."
_NUM = f"Requests of each level. Default: {DEFAULT_REQUESTS}, or as many as --duration has."
_DURATION = "Seconds of sending in each level; what runs then is waited for."
_DATASET = 'JSON lines with "prompt" or "messages" (and "max_tokens"), or a ShareGPT-style list.'
_TOKENS = "Random prompts as token ids or as text; auto takes ids where the server does."
_IDS = "Token ids that random prompts are drawn from. Default: some that the server's /tokenize gives."
_IGNORE_EOS = "Go on to the full length. Default: for random work where the server takes it."
_EXTRA = "Members of each request, over all others, such as '{\"top_p\": 0.9}'."
_GOODPUT = "Count requests within these milliseconds, such as ttft:500,tpot:50,e2e:5000."
_FLOOR = "The model that the server runs on this machine, to show what the load needs at least."
_JSON = "Write a record with the figures and every request's raw timestamps."


def serve(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The server, such as http://localhost:8000.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Its name there. Default: the first that it lists.")
    ] = None,
    endpoint: Annotated[
        EndpointName, typer.Option("--endpoint", metavar="NAME", help="completions or chat. Default: completions.")
    ] = EndpointName.completions,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Longest time of one request. Default: 600.")
    ] = 600.0,
    rate: Annotated[str | None, _option(_RATE, "--rate", _LOAD, "R,…")] = None,
    concurrency: Annotated[str | None, _option(_CONCURRENCY, "--concurrency", _LOAD, "N,…")] = None,
    arrival: Annotated[ArrivalName | None, _option(_ARRIVAL, "--arrival", _LOAD, "NAME")] = None,
    burstiness: Annotated[float | None, _option(_BURSTINESS, "--burstiness", _LOAD, "X")] = None,
    burst_size: Annotated[int | None, _option("Requests of a burst.", "--burst-size", _LOAD, "N")] = None,
    num_requests: Annotated[int | None, _option(_NUM, "--num-requests", _LOAD, "N")] = None,
    duration: Annotated[float | None, _option(_DURATION, "--duration", _LOAD, "SECONDS")] = None,
    num_warmups: Annotated[
        int, _option("Requests sent before, and not measured. Default: 1.", "--num-warmups", _LOAD, "N")
    ] = 1,
    seed: Annotated[int, _option("Of arrivals and work. Default: 0.", "--seed", _LOAD, "N")] = 0,
    random_input: Annotated[
        str | None, _option("Length of random prompts in tokens. Default: 128.", "--random-input", _WORK, "LOW..HIGH")
    ] = None,
    random_output: Annotated[
        str | None, _option("New tokens of random requests. Default: 64.", "--random-output", _WORK, "LOW..HIGH")
    ] = None,
    dataset: Annotated[Path | None, _option(_DATASET, "--dataset", _WORK, "FILE")] = None,
    tokens: Annotated[TokensName, _option(_TOKENS, "--tokens", _WORK, "auto|ids|text")] = TokensName.auto,
    token_id_range: Annotated[str | None, _option(_IDS, "--token-id-range", _WORK, "LOW..HIGH")] = None,
    ignore_eos: Annotated[bool | None, _option(_IGNORE_EOS, "--ignore-eos/--no-ignore-eos", _WORK)] = None,
    extra_body: Annotated[str, _option(_EXTRA, "--extra-body", _WORK, "JSON")] = "{}",
    goodput: Annotated[str | None, _option(_GOODPUT, "--goodput", _RESULT, "NAME:MS,…")] = None,
    floor_model: Annotated[str | None, _option(_FLOOR, "--floor-model", _FLOORS, "FAMILY[:VARIANT]")] = None,
    floor_weights: Annotated[Path | None, _option("Its checkpoint.", "--floor-weights", _FLOORS, "DIR")] = None,
    floor_dtype: Annotated[str | None, _option("Its compute dtype.", "--floor-dtype", _FLOORS, "NAME")] = None,
    floor_threads: Annotated[int | None, _option("Its CPU threads.", "--floor-threads", _FLOORS, "N")] = None,
    json_file: Annotated[Path | None, _option(_JSON, "--json", _RESULT, "FILE")] = None,
) -> None:
    """Measure a server that speaks OpenAI's API: its times and throughput under load.

    Works with any such server. A key comes from NPU_ZOO_API_KEY or OPENAI_API_KEY. Failed requests are counted, none is
    sent again, and it ends with 1 where all of a level failed. Ctrl-C ends it with what was measured.
    """
    arguments = {name: _plain(value) for name, value in locals().items() if value is not None}
    loads = parse_loads(rate, concurrency, arrival, burstiness, burst_size)
    _check_amounts(num_requests, duration, num_warmups, timeout)
    _check_end(loads, num_requests, duration)
    _check_work(dataset, random_input, random_output, token_id_range, tokens, endpoint)
    extra, goal = parse_extra_body(extra_body), Goal.parse(goodput) if goodput else None
    lengths = [
        parse_length_range(text or default, option)
        for text, default, option in ((random_input, "128", "--random-input"), (random_output, "64", "--random-output"))
    ]
    address = ServerAddress.parse(url, "--url")
    served = FloorOptions(floor_model, floor_weights, floor_dtype, floor_threads).check(address)
    _require_aiohttp()
    if json_file:
        from npu_zoo.evaluation.record import require_record_place

        require_record_place(json_file, KIND)
    from npu_zoo.evaluation.serving.measuring import ServePlan

    plan = ServePlan(
        loads=loads,
        model=model,
        endpoint=endpoint.value,
        num_requests=num_requests or (None if duration else DEFAULT_REQUESTS),
        duration=duration,
        num_warmups=num_warmups,
        input_lengths=lengths[0],
        output_lengths=lengths[1],
        dataset=dataset,
        tokens=tokens.value,
        token_ids=parse_token_ids(token_id_range),
        ignore_eos=ignore_eos,
        extra_body=extra,
        goal=goal,
        seed=seed,
    )
    with exit_on_sigterm():
        report = _Report(served, measure_floor(served), arguments, json_file)
        with report:
            _measure(address, plan, timeout, report.keep)
    _finish(report.result)


class _Report(contextlib.AbstractContextManager["_Report"]):
    """What there is: written after each level, and shown at the end, whatever ends it.

    Args:
        served: the model whose floors are shown, and ``machine`` what was measured for them; None for none.
        file: that the record is written to.
    """

    def __init__(
        self, served: EngineConfig | None, machine: Machine | None, arguments: dict[str, Any], file: Path | None
    ) -> None:
        self.result: ServeResult | None = None
        self._served, self._machine = served, machine
        self._arguments, self._file = arguments, file
        self._client_machine = machine or (_describe_client() if file else None)

    def keep(self, result: ServeResult) -> None:
        """Take what was measured so far."""
        self.result = with_floors(result, self._served, self._machine)
        if self._file:
            _write(self.result, self._client_machine, self._arguments, self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.result is not None:
            print_result(self.result, self._machine)


def _finish(result: ServeResult | None) -> None:
    """End with the code that says how it went."""
    if result is None:
        raise typer.Exit(INTERRUPTED)
    if result.interrupted:
        note("interrupted: the figures are of what was measured until then")
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(FAILED)


def _measure(address: ServerAddress, plan: ServePlan, timeout: float, keep: Callable[[ServeResult], None]) -> None:
    """Run the benchmark; nothing is kept where it is interrupted before anything is measured."""
    from npu_zoo.evaluation.serving.client import Client, raise_file_limit
    from npu_zoo.evaluation.serving.measuring import ServeBench

    raise_file_limit()
    key = api_key()
    if key and not (address.encrypted or address.loopback):
        note(f"the API key goes to {address.host} without encryption; use https where others can listen")

    async def run(progress: ServeProgress) -> ServeResult | None:
        async with Client(address, key, timeout=timeout) as client:
            bench = ServeBench(
                client,
                plan,
                on_note=progress.note,
                on_level=progress.begin,
                on_change=progress.update,
                on_result=keep,
            )
            with _stopped_by_interrupt(bench.stop):
                return await bench.run()

    with ServeProgress() as progress:
        result = asyncio.run(run(progress))
    if result is not None:
        keep(result)


@contextlib.contextmanager
def _stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C stops the benchmark; a second one ends the program as it would elsewhere."""
    loop = asyncio.get_running_loop()

    def handle() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, handle)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _write(result: ServeResult, machine: Machine | None, arguments: dict[str, Any], file: Path) -> None:
    from npu_zoo.evaluation.record import ResultRecord, write_record

    record = ResultRecord(
        kind=KIND,
        machine=machine,
        arguments=arguments,
        body=result.model_dump(mode="json"),
        figures=result.headline(),
    )
    write_record(record, file)


def _describe_client() -> Machine:
    from npu_zoo.evaluation.machine import describe_machine

    return describe_machine()


def _require_aiohttp() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("bench serve needs aiohttp, which is not installed here: pip install 'npu-zoo[bench]'")


def _check_amounts(num_requests: int | None, duration: float | None, num_warmups: int, timeout: float) -> None:
    if num_requests is not None and num_requests < 1:
        raise UsageError(f"--num-requests {num_requests} is not 1 or more")
    if num_warmups < 0:
        raise UsageError(f"--num-warmups {num_warmups} is not 0 or more")
    for name, seconds in (("--duration", duration), ("--timeout", timeout)):
        if seconds is not None and not 0 < seconds < float("inf"):
            raise UsageError(f"{name} {seconds:g} is no number of seconds above 0")


def _check_end(loads: Sequence[Load], num_requests: int | None, duration: float | None) -> None:
    endless = any(isinstance(load, OpenLoop) and load.finite_rate is None for load in loads)
    if endless and duration is not None and num_requests is None:
        raise UsageError(
            f"--rate inf sends all requests at once, and --duration {duration:g} does not say how many; "
            "give --num-requests N"
        )


def _check_work(
    dataset: Path | None,
    random_input: str | None,
    random_output: str | None,
    token_id_range: str | None,
    tokens: TokensName,
    endpoint: EndpointName,
) -> None:
    """Refuse options that would have no effect."""
    given = {"--random-input": random_input, "--random-output": random_output, "--token-id-range": token_id_range}
    if dataset and (wrong := [name for name, value in given.items() if value is not None]):
        raise UsageError(f"{', '.join(wrong)}: goes with random work, and --dataset says what is sent")
    ids = tokens == TokensName.ids or token_id_range is not None
    if ids and (endpoint == EndpointName.chat or tokens == TokensName.text):
        raise UsageError("prompts are token ids with --endpoint completions alone, and without --tokens text")


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (ArrivalName, EndpointName, TokensName)):
        return value.value
    return str(value) if isinstance(value, Path) else value
