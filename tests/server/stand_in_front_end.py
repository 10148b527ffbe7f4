"""A front end for tests: a JSON object a line, over TCP. Its options say how it is to fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from npu_zoo.core.engine import GenerationRequest
from npu_zoo.core.errors import ConfigError, NpuZooError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server.client import EngineClient
from npu_zoo.server.front_end_process import FrontEndSetup


def serve(descriptor: int, setup: FrontEndSetup) -> None:
    fault = (setup.options or {}).get("fault")
    if fault == "raise_on_purpose":
        raise ConfigError("the file of keys is missing; give another one")
    if fault == "be_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    asyncio.run(FrontEnd(setup).serve(socket.socket(fileno=descriptor)))


class FrontEnd:
    def __init__(self, setup: FrontEndSetup) -> None:
        self.setup = setup
        self.client = EngineClient(setup.engine_path)
        self.running = 0
        self.draining = asyncio.Event()

    async def serve(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.draining.set)
        await self.client.start()
        server = await asyncio.start_server(self.converse, sock=listener)
        await self.draining.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.idle(), self.setup.grace_period)
        server.close()
        await self.client.close()

    async def idle(self) -> None:
        while self.running:
            await asyncio.sleep(0.02)

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if not line:
            return
        answering = asyncio.ensure_future(self.answer(json.loads(line), writer))
        leaving = asyncio.ensure_future(reader.read())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        writer.close()

    async def answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.running += 1
        try:
            async for state in self.states(body):
                writer.write(json.dumps(state).encode() + b"\n")
                await writer.drain()
        except NpuZooError as error:
            writer.write(json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")
        finally:
            self.running -= 1

    async def states(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if body["do"] == "look":
            client, info = self.client, self.client.info
            yield {
                "ready": client.ready,
                "engine": info.pid if info else None,
                "front_end": os.getpid(),
                "stats": asdict(client.stats),
                "losses": client.losses,
            }
        elif self.draining.is_set():
            yield {"error": "Draining"}
        else:
            request = GenerationRequest(body["id"], body["prompt"], SamplingParams(**body["params"]))
            states = self.client.generate(request)
            async with contextlib.aclosing(states):
                async for state in states:
                    output = state.outputs[0]
                    yield {"token_ids": output.token_ids, "finished": state.finished}
