"""``bench serve``: the load generator for any server of OpenAI's API."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from npu_zoo.cli.bench.serve_floor import FloorOptions
from npu_zoo.cli.bench.serve_options import (
    ArrivalName,
    EndpointName,
    TokensName,
    parse_length_range,
    parse_loads,
    parse_token_ids,
)
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.serving.arrivals import Load, OpenLoop

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
    # Their imports would slow every other command's start.
    from npu_zoo.evaluation.serving.figures import Goal
    from npu_zoo.evaluation.serving.requests import parse_extra_body
    from npu_zoo.protocol.server_address import ServerAddress

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
    from npu_zoo.cli.bench.serve_run import run_plan
    from npu_zoo.evaluation.serving.measuring import ServePlan

    if json_file:
        from npu_zoo.evaluation.record import require_record_place

        require_record_place(json_file, "bench serve")
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
    run_plan(plan, address, timeout, served, arguments, json_file)


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
