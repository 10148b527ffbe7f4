"""One HTTP request that generates: what is known of it while it runs, for logs, metrics and traces."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace

from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.protocol.answering import Answering, OutputFailed, require_whole
from npu_zoo.server.client import ClientClosed, EngineDied
from npu_zoo.server.metrics import ServerMetrics

_SEED_BITS = 63

Generate = Callable[[GenerationRequest], AsyncGenerator[RequestOutput, None]]


class Exchange:
    """A request's prompts in the engine, observed.

    Args:
        kind: of request, such as ``chat``.
        generate: runs a prompt in the engine.
        max_time: seconds that the server gives each of them; None for no limit.
        draw_seeds: whether requests without a seed get one each.
        arrival_time: when the server had the request, on the monotonic clock.

    Attributes:
        answer_id: as the answer's JSON names itself.
        outputs: each prompt's newest state, by its place.
    """

    def __init__(
        self,
        kind: str,
        answering: Answering,
        generate: Generate,
        metrics: ServerMetrics,
        *,
        max_time: float | None,
        draw_seeds: bool,
        arrival_time: float,
    ) -> None:
        self.requests = [_seeded(_within(request, max_time), draw_seeds) for request in answering.requests]
        self.answer_id = answering.id
        self.stream = answering.stream
        self.outputs: dict[int, RequestOutput] = {}
        self._generate = generate
        self._places = {request.request_id: place for place, request in enumerate(self.requests)}
        self._observed = [
            metrics.received(kind, len(request.prompt_token_ids), request.sampling_params, arrival_time)
            for request in self.requests
        ]

    @property
    def finished(self) -> bool:
        """Whether every completion came to an end of its own, or to a limit."""
        ends = [completion.finish_reason for output in self.outputs.values() for completion in output.outputs]
        return len(self.outputs) == len(self.requests) and all(end in ("stop", "length") for end in ends)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        """Run one of the prompts and note how it goes on and ends."""
        place = self._places[request.request_id]
        observed = self._observed[place]
        try:
            async with contextlib.aclosing(self._generate(request)) as states:
                async for output in states:
                    self.outputs[place] = output
                    require_whole(output)
                    (observed.finished if output.finished else observed.progressed)(output)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            observed.aborted("disconnect", self.outputs.get(place))
            raise
        except ClientClosed:
            observed.aborted("shutdown", self.outputs.get(place))
            raise
        except OutputFailed:
            observed.failed("form", self.outputs[place])
            raise
        except Exception as error:
            observed.failed("engine_died" if isinstance(error, EngineDied) else "engine_error")
            raise


def _within(request: GenerationRequest, max_time: float | None) -> GenerationRequest:
    limits = [limit for limit in (request.max_time, max_time) if limit is not None]
    return replace(request, max_time=min(limits, default=None))


def _seeded(request: GenerationRequest, draw_seeds: bool) -> GenerationRequest:
    if not draw_seeds or request.sampling_params.seed is not None:
        return request
    params = replace(request.sampling_params, seed=secrets.randbits(_SEED_BITS))
    return replace(request, sampling_params=params)
