"""What the server's routes share: the engine's client, the protocol, and who may send how much."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import GenerationRequest, RequestOutput
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.errors import ApiError, api_error
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.server.admission import AdmissionQueue, BodyRoom, ClientLimits
from npu_zoo.server.client import ClientClosed, EngineClient, EngineDied
from npu_zoo.server.forms import FormChecker, FrontEndEncoder, UncheckedForm
from npu_zoo.server.keys import ApiKeys
from npu_zoo.server.metrics import ServerMetrics
from npu_zoo.server.options import ServeOptions
from npu_zoo.server.readers import Readers
from npu_zoo.server.tracing import start_tracing

_RETRY_S = 5
_BODIES_AT_ONCE = 16  # of the largest size that may be read and prepared together


class Service:
    """A server's state, of one event loop.

    Args:
        config: of the engine's run.
        options: how the server was started.
        client: of the engine, which may not be there yet.
        defaults: sampling parameters of requests that name none.
        draw_seeds: whether requests without a seed get one each, and not all the engine's.

    Attributes:
        draining: whether new requests are turned away since the server is about to end.
        running: HTTP requests that generate.
    """

    def __init__(
        self,
        config: EngineConfig,
        options: ServeOptions,
        client: EngineClient,
        defaults: Mapping[str, Any] | None = None,
        *,
        draw_seeds: bool = True,
    ) -> None:
        self.config = config
        self.options = options
        self.client = client
        self.draw_seeds = draw_seeds
        self.draining = False
        self.running = 0
        self.keys = ApiKeys.load(options.api_key_file, os.environ)
        self.queue = AdmissionQueue(config.max_num_seqs, options.max_queue)
        self.bodies = BodyRoom(_BODIES_AT_ONCE * options.max_body_size)
        self.readers = Readers(config.max_num_seqs + options.max_queue)
        self.limits = ClientLimits(options.rate_limit, options.concurrency_limit)
        self.forms = FormChecker(config)
        self.encoder = FrontEndEncoder(config, self.forms)
        limits = ProtocolLimits(max_n=options.max_n, max_completion_tokens=options.max_completion_tokens)
        self.protocol = OpenAIProtocol(self.encoder, self.model_names, limits, defaults or {})
        self.metrics = ServerMetrics(self.model_names[0], config.max_model_len)
        self.tracing = start_tracing(options.otlp_endpoint)

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model, the first being its name in answers."""
        return self.options.served_model_name or (self.config.model, self.config.family)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.client.ready and not self.draining

    @property
    def status(self) -> str:
        """Why it is ready or not, in a word."""
        if self.draining:
            return "draining"
        return "ok" if self.client.ready else "starting"

    def require_ready(self) -> None:
        """Raise what a request is told while none is taken.

        Raises:
            ApiError: 503, with the time to wait.
        """
        if self.draining:
            raise unavailable("the server is ending and takes no more requests", code="draining")
        if not self.client.ready:
            raise unavailable("the model is being loaded", code="engine_not_ready")
        if self.client.info is not None:
            self.encoder.max_model_len = self.client.info.max_model_len

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Count an HTTP request that generates as long as the block lasts."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def prepare(self, make: Callable[[], Answering]) -> Answering:
        """Read a request that generates; the form of its output is tried before the engine has it."""
        while True:
            try:
                answering = await self.readers.run(make)
                _check_priority(answering, self.options.min_priority)
                return answering
            except UncheckedForm as unchecked:
                await self.forms.check(unchecked.form)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Run a request in the engine."""
        return self.client.generate(request)


def _check_priority(answering: Answering, least: int) -> None:
    asked = min(request.priority for request in answering.requests)
    if asked < least:
        raise ApiError(400, f"priority is {asked}, and requests may ask for {least} and more", param="priority")


def unavailable(message: str, *, code: str) -> ApiError:
    """A 503 that says when to try again."""
    return ApiError(
        503,
        f"{message}; try again in {_RETRY_S} s",
        type="service_unavailable_error",
        code=code,
        headers={"Retry-After": str(_RETRY_S)},
    )


def told(error: BaseException) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, EngineDied):
        return unavailable(str(error), code="draining" if isinstance(error, ClientClosed) else "engine_lost")
    return api_error(error)
