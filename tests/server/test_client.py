"""The client against a real engine in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import EngineStats, GenerationRequest, RequestOutput
from npu_zoo.core.errors import PromptError, UsageError
from npu_zoo.server.channel import frame, read_frame
from npu_zoo.server.client import ClientClosed, EngineClient, EngineDied
from npu_zoo.server.messages import Progress, Ready, Submit, apply_delta, initial_output

from .conftest import serving

SECONDS = 60.0
LONG = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def run(path: Path, act: Callable[[EngineClient], Awaitable[Any]], **options: Any) -> Any:
    """Run a coroutine function with a client that is ready."""

    async def main() -> Any:
        client = EngineClient(path, **options)
        await client.start()
        try:
            await asyncio.wait_for(client.wait_ready(), SECONDS)
            return await asyncio.wait_for(act(client), SECONDS)
        finally:
            await client.close()

    return asyncio.run(main())


async def last(states: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return [state async for state in states][-1]


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), SECONDS)


PARAMS = [
    {"temperature": 0, "max_tokens": 20},
    {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "top_k": 40, "max_tokens": 12, "logprobs": 2},
    {"temperature": 0, "max_tokens": 6, "logprobs": 0, "prompt_logprobs": 2},
    {"temperature": 0, "max_tokens": 30, "stop": ["\n", "def"]},
    {"temperature": 0, "max_tokens": 8, "min_tokens": 4, "repetition_penalty": 1.2},
]


def test_outputs_are_those_of_each_request_alone(llm: LLM, tmp_path: Path) -> None:
    prompts = [list(range(5, 9 + number % 17)) for number in range(64)]
    params = [SamplingParams(**PARAMS[number % len(PARAMS)]) for number in range(64)]
    alone = [llm.generate([prompt], sampling)[0] for prompt, sampling in zip(prompts, params, strict=True)]

    async def act(client: EngineClient) -> list[RequestOutput]:
        requests = [GenerationRequest(f"r{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        return await asyncio.gather(*(last(client.generate(request)) for request in requests))

    with serving(llm, tmp_path / "engine"):
        together = run(tmp_path / "engine", act)
    for number, (expected, found) in enumerate(zip(alone, together, strict=True)):
        assert found.metrics.first_token_time is not None
        assert rounded(found) == replace(rounded(expected), request_id=f"r{number}", metrics=found.metrics)


def rounded(output: RequestOutput) -> RequestOutput:
    """A batch's shape may move a log-probability in its last digits."""

    def entries(logprobs: Any) -> Any:
        return logprobs and [
            entry and {i: replace(found, logprob=round(found.logprob, 3), rank=0) for i, found in entry.items()}
            for entry in logprobs
        ]

    completions = [
        replace(
            completion,
            logprobs=entries(completion.logprobs),
            cumulative_logprob=completion.cumulative_logprob and round(completion.cumulative_logprob, 2),
        )
        for completion in output.outputs
    ]
    return replace(output, outputs=completions, prompt_logprobs=entries(output.prompt_logprobs))


def test_states_grow_token_by_token_and_a_slow_consumer_gets_fewer(engine_path: Path) -> None:
    async def act(client: EngineClient) -> None:
        lengths = {0.0: [], 0.05: []}
        for pause, seen in lengths.items():
            async for state in client.generate(GenerationRequest("slow", [5, 6], replace(SHORT, max_tokens=100))):
                assert len(state.outputs[0].token_ids) > sum(seen[-1:])
                seen.append(len(state.outputs[0].token_ids))
                await asyncio.sleep(pause)
        assert lengths[0.0][-1] == lengths[0.05][-1] == 100
        assert len(lengths[0.05]) < len(lengths[0.0])

    run(engine_path, act)


async def closed(client: EngineClient) -> None:
    async with aclosing(client.generate(GenerationRequest("left", [5], LONG))) as states:
        await anext(states)


async def cancelled(client: EngineClient) -> None:
    task = asyncio.create_task(last(client.generate(GenerationRequest("left", [5], LONG))))
    await until(lambda: client.stats.num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def aborted(client: EngineClient) -> None:
    states = client.generate(GenerationRequest("left", [5], LONG))
    await anext(states)
    await client.abort("left")
    assert (await last(states)).outputs[0].finish_reason == "abort"


async def aborted_while_waiting(client: EngineClient) -> None:
    """More requests than the engine runs at once."""
    tasks = [
        asyncio.create_task(last(client.generate(GenerationRequest(str(number), [5, number], LONG))))
        for number in range(40)
    ]
    await until(lambda: client.stats.num_waiting > 0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("leave", [closed, cancelled, aborted, aborted_while_waiting])
def test_an_abort_frees_what_the_request_held(
    engine_path: Path, leave: Callable[[EngineClient], Awaitable[None]]
) -> None:
    seen: list[EngineStats] = []

    async def act(client: EngineClient) -> None:
        await leave(client)
        await until(lambda: (client.stats.num_running, client.stats.num_waiting) == (0, 0))
        assert client.stats.kv_cache_usage == 0
        assert client.ready
        await last(client.generate(GenerationRequest("left", [5], SHORT)))  # the id is free again

    run(engine_path, act, on_stats=seen.append)
    assert max(stats.kv_cache_usage for stats in seen) > 0


def test_a_request_that_is_not_taken_raises_what_the_engine_raised(engine_path: Path) -> None:
    async def act(client: EngineClient) -> RequestOutput:
        running = asyncio.create_task(last(client.generate(GenerationRequest("runs", [5], replace(SHORT)))))
        with pytest.raises(PromptError, match="no token id"):
            await last(client.generate(GenerationRequest("unknown", [10**9], SHORT)))
        with pytest.raises(PromptError, match="empty"):
            await last(client.generate(GenerationRequest("empty", [], SHORT)))
        with pytest.raises(UsageError, match="max_time"):
            await last(client.generate(GenerationRequest("late", [5], SHORT, max_time=-1.0)))
        return await running

    assert len(run(engine_path, act).outputs[0].token_ids) == 8


def test_an_id_is_used_once_at_a_time(engine_path: Path) -> None:
    async def act(client: EngineClient) -> None:
        async with aclosing(client.generate(GenerationRequest("same", [5], LONG))) as states:
            await anext(states)
            with pytest.raises(UsageError, match="'same' is in use"):
                await last(client.generate(GenerationRequest("same", [6], SHORT)))
            before = len((await anext(states)).outputs[0].token_ids)
            assert len((await anext(states)).outputs[0].token_ids) > before

    run(engine_path, act)


def test_priority_and_time_limit_reach_the_engine(engine_path: Path) -> None:
    async def act(client: EngineClient) -> RequestOutput:
        return await last(client.generate(GenerationRequest("short", [5], LONG, priority=-1, max_time=0.2)))

    [completion] = run(engine_path, act).outputs
    assert (completion.finish_reason, completion.stop_reason) == ("length", "max_time")


def test_a_lost_engine_fails_what_runs_and_the_next_one_is_found(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "engine"

    async def act(client: EngineClient) -> None:
        with pytest.raises(EngineDied, match="not ready"):
            await last(client.generate(GenerationRequest("early", [5], SHORT)))
        for losses in range(2):
            with serving(llm, path):
                await asyncio.wait_for(client.wait_ready(), SECONDS)
                assert client.losses == losses
                running = [
                    asyncio.create_task(last(client.generate(GenerationRequest(str(n), [5], LONG)))) for n in range(3)
                ]
                await until(lambda: client.stats.num_running == 3)
            for task in running:
                with pytest.raises(EngineDied, match="lost"):
                    await task
            assert not client.ready
            assert client.stats == EngineStats()
            path.unlink()

    async def main() -> None:
        client = EngineClient(path)
        await client.start()
        await act(client)
        await client.close()

    asyncio.run(main())


def test_close_ends_what_runs_and_frees_it(llm: LLM, engine_path: Path) -> None:
    async def act(client: EngineClient) -> None:
        running = asyncio.create_task(last(client.generate(GenerationRequest("runs", [5], LONG))))
        await until(lambda: client.stats.num_running == 1)
        await client.close()
        with pytest.raises(ClientClosed, match="ended"):
            await running
        with pytest.raises(ClientClosed, match="ended"):
            await last(client.generate(GenerationRequest("late", [5], LONG)))
        await client.close()

    run(engine_path, act)

    async def look(client: EngineClient) -> None:
        await until(lambda: client.stats.num_running == 0)

    run(engine_path, look)


def frames(connection: socket.socket) -> Iterator[list[Any]]:
    with connection.makefile("rb") as stream:
        while True:
            yield read_frame(stream.read)


def test_what_a_client_that_does_not_read_has_missed_comes_together(llm: LLM, engine_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True, logprobs=20)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.connect(str(engine_path))
        stopped.sendall(frame([Submit(4, GenerationRequest("stopped", [5, 6], params))]))

        async def act(client: EngineClient) -> RequestOutput:
            await until(lambda: client.stats.num_running > 0)
            other = await last(client.generate(GenerationRequest("reads", [5, 6], params)))
            await until(lambda: client.stats.num_running == 0)
            return other

        expected = run(engine_path, act)
        output, count = initial_output(GenerationRequest("reads", [5, 6], params)), 0
        for messages in frames(stopped):
            for message in messages:
                assert isinstance(message, (Ready, Progress))
                for delta in message.deltas if isinstance(message, Progress) else ():
                    count += 1
                    apply_delta(output, delta)
            if output.finished:
                break
    assert count < 300
    assert output.outputs == expected.outputs


def test_supervisor_and_client_are_light() -> None:
    program = "import sys, npu_zoo.server.supervisor, npu_zoo.server.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=SECONDS)
    assert not {"torch", "torch_npu", "transformers", "fastapi", "uvicorn"} & set(done.stdout.split())
