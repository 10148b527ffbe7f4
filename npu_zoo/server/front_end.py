"""The process that clients talk to: uvicorn with the routes, and how it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.config
import resource
import signal
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from npu_zoo.core.engine import EngineStats
from npu_zoo.server.app import create_app
from npu_zoo.server.client import EngineClient
from npu_zoo.server.front_end_process import FrontEndSetup
from npu_zoo.server.http_protocol import protocol_with
from npu_zoo.server.logs import LOGGER, log, logging_config
from npu_zoo.server.options import ServeOptions
from npu_zoo.server.service import Service

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_CLOSE = 2
_SECONDS_FOR_ENGINE = 1.0
_MOST_OF_A_HEAD = 65536
"""Bytes of a request's line and headers that are there while the rest is not."""
_MOST_OPEN_FILES = 65536


def serve(descriptor: int, setup: FrontEndSetup) -> None:
    """Serve on a listening socket until SIGTERM, as :class:`~npu_zoo.server.front_end_process.FrontEndStart` asks."""
    options: ServeOptions = setup.options.serve
    logging.config.dictConfig(logging_config(options.log_format, options.log_level, options.log_file))
    _allow_many_connections()
    with socket.socket(fileno=descriptor) as listener:
        asyncio.run(FrontEnd(setup).run(listener))


class FrontEnd:
    """One front end, from its start to its end."""

    def __init__(self, setup: FrontEndSetup) -> None:
        self._setup = setup
        self._options: ServeOptions = setup.options.serve
        self._engines = 0

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM, and then until what runs has finished or the grace period is over."""
        self._client = EngineClient(self._setup.engine_path, self._note)
        given = self._setup.options
        self._service = Service(
            self._setup.config, self._options, self._client, given.defaults, draw_seeds=given.draw_seeds
        )
        await self._client.start()
        with contextlib.suppress(asyncio.TimeoutError):
            # A front end that takes another's place finds the engine there, and clients that wait for an answer.
            await asyncio.wait_for(self._client.wait_ready(), _SECONDS_FOR_ENGINE)
        server = _Server(uvicorn_config(create_app(self._service), self._options))
        terminated = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
        draining = asyncio.create_task(self._drain(server, terminated))
        try:
            await server.serve(sockets=[listener])
        finally:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            await self._client.close()
            await self._service.forms.close()
            self._service.readers.close()
            await asyncio.to_thread(self._service.tracing.shutdown)

    async def _drain(self, server: uvicorn.Server, terminated: asyncio.Event) -> None:
        await terminated.wait()
        service, logger = self._service, logging.getLogger(LOGGER)
        service.draining = True
        fields = {"running": service.running, "grace_seconds": self._setup.grace_period}
        log(logger, logging.INFO, "drain", "no new requests are taken; the running ones may finish", fields)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), self._setup.grace_period)
        if service.running:
            log(logger, logging.WARNING, "drain", "the grace period is over", {"ended": service.running})
        # What still runs is told so, and gets an end.
        await self._client.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), _SECONDS_TO_CLOSE)
        server.should_exit = True

    async def _idle(self) -> None:
        while self._service.running:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def _note(self, stats: EngineStats) -> None:
        metrics, info = self._service.metrics, self._client.info
        if not self._client.ready:
            metrics.engine_stopped()
            return
        if info is not None and info.pid != self._engines:
            (metrics.engine_restarted if self._engines else metrics.engine_started)(info.pid)
            self._engines = info.pid
        metrics.engine_stats(stats)


class _Server(uvicorn.Server):
    """Leaves the signals to the front end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def uvicorn_config(application: ASGIApp, options: ServeOptions) -> uvicorn.Config:
    """How uvicorn is to serve an application."""
    return uvicorn.Config(
        application,
        http=protocol_with(head_timeout=options.head_timeout, send_timeout=options.send_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(options.forwarded_allow_ips),  # by itself it would believe every client on this machine
        forwarded_allow_ips=list(options.forwarded_allow_ips),
        timeout_keep_alive=max(1, round(options.keep_alive)),
        timeout_graceful_shutdown=_SECONDS_TO_CLOSE,
        backlog=2048,
        h11_max_incomplete_event_size=_MOST_OF_A_HEAD,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=str(options.ssl_ca_certs) if options.ssl_ca_certs else None,
        ssl_cert_reqs=2 if options.ssl_ca_certs else 0,
    )


def _allow_many_connections() -> None:
    """Raise the limit of open files, which is often 1,024, as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
