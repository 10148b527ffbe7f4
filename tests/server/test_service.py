"""What the server's options make of its protocol."""

from __future__ import annotations

from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.server.client import EngineClient
from npu_zoo.server.options import ServeOptions
from npu_zoo.server.service import Service


def limits(options: ServeOptions) -> ProtocolLimits:
    config = resolve(EngineArgs(model="deepseek_coder"))
    return Service(config, options, EngineClient("unused")).protocol.limits


def test_limits_of_requests_are_the_protocol_s() -> None:
    assert limits(ServeOptions()) == ProtocolLimits()
    assert limits(ServeOptions(max_n=3, max_completion_tokens=8)) == ProtocolLimits(max_n=3, max_completion_tokens=8)
