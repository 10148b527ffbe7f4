"""What `npu-zoo serve` can be told, in one place for its options, its help and its documentation."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeOptions(BaseModel):
    """How the server listens, whom it serves and within which limits; times are in seconds, sizes in bytes.

    Raises:
        pydantic.ValidationError: a value is out of its range, or values contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 or :: takes every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and says which.")
    served_model_name: tuple[str, ...] = Field(
        (), description="Name of the model in requests, instead of the one after --model; repeatable."
    )
    api_key_file: Path | None = Field(
        None, description="File of API keys, one a line; NPU_ZOO_API_KEY in the environment is one too."
    )
    allowed_host: tuple[str, ...] = Field(
        (),
        description="Host header that is served, such as api.example.org; repeatable. "
        "On a loopback address the default is that address, elsewhere any.",
    )
    cors_origin: tuple[str, ...] = Field(
        (), description="Web origin that may call the server from a browser; repeatable. Default: none."
    )
    ssl_certfile: Path | None = Field(None, description="Certificate chain in PEM form: the server speaks TLS.")
    ssl_keyfile: Path | None = Field(None, description="Its private key; unset where the chain's file holds it.")
    ssl_ca_certs: Path | None = Field(None, description="Authorities; clients must have a certificate of one of them.")
    forwarded_allow_ips: tuple[str, ...] = Field(
        (),
        description="Address or network of a proxy whose X-Forwarded-For says who the client is; repeatable. "
        "* trusts everybody's. Default: nobody's.",
    )
    max_queue: int = Field(
        256, ge=0, description="Completions that may wait beside those that run; more are refused with status 429."
    )
    max_body_size: int = Field(4 * 2**20, ge=1024, description="Largest request body in bytes; above it: status 413.")
    max_n: int = Field(128, ge=1, le=1024, description="Most answers to a prompt (n); more are refused.")
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of an answer; more are refused, and a chat that does not say gets this many. "
        "Default: what the model has room for.",
    )
    rate_limit: int | None = Field(None, ge=1, description="Requests a minute and API key (or address, without keys).")
    concurrency_limit: int | None = Field(None, ge=1, description="Requests at once per API key (or address).")
    min_priority: int = Field(
        0, ge=-(2**31), le=0, description="Most urgent (lowest) priority that a request may ask for."
    )
    request_timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Longest time of a request; its output ends as it is then."
    )
    head_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Longest time for a request's line and headers to arrive."
    )
    body_timeout: float = Field(30.0, gt=0, allow_inf_nan=False, description="Longest time for its body.")
    send_timeout: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="How long a client may take nothing of what is sent to it."
    )
    keep_alive: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="How long an unused connection is kept open."
    )
    grace: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="How long running requests may go on after SIGTERM."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_file: Path | None = Field(None, description="File that log lines are added to; standard error when unset.")
    log_prompts: bool = Field(False, description="Write prompts into the log too.")
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector (OTLP over HTTP) that gets a span for each request."
    )

    @model_validator(mode="after")
    def _contradictions(self) -> ServeOptions:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ValueError("ssl_keyfile and ssl_ca_certs need ssl_certfile")
        return self

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host headers that are served; none means any."""
        if self.allowed_host:
            return self.allowed_host
        return tuple(dict.fromkeys((*LOOPBACK, self.host))) if is_loopback(self.host) else ()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class FrontEndOptions:
    """What the front end is told beside the engine's config.

    Attributes:
        defaults: sampling parameters of requests that name none.
        draw_seeds: whether requests without a seed get one each, and not all the engine's.
    """

    serve: ServeOptions
    defaults: Mapping[str, Any]
    draw_seeds: bool = True
