"""What the options of ``bench serve`` say, read and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from enum import Enum

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.arrivals import ClosedLoop, Load, OpenLoop
from npu_zoo.evaluation.serving.work import LengthRange

API_KEYS = ("NPU_ZOO_API_KEY", "OPENAI_API_KEY")


class ArrivalName(str, Enum):
    """How requests of an open loop arrive."""

    poisson = "poisson"
    burst = "burst"


class EndpointName(str, Enum):
    """A route below /v1."""

    completions = "completions"
    chat = "chat"


class TokensName(str, Enum):
    """What random prompts are made of."""

    auto = "auto"
    ids = "ids"
    text = "text"


def api_key() -> str | None:
    """The key that the environment holds, if it does."""
    keys = (os.environ.get(name, "").strip() for name in API_KEYS)
    return next((key for key in keys if key), None)


def parse_loads(
    rate: str | None,
    concurrency: str | None,
    arrival: ArrivalName | None,
    burstiness: float | None,
    burst_size: int | None,
) -> list[Load]:
    """The levels of ``--rate`` or ``--concurrency``.

    Raises:
        UsageError: both or neither are given, a value is out of its range, or an option goes with another one.
    """
    if (rate is None) == (concurrency is None):
        raise UsageError("the load is --rate R (requests a second, whatever the server does) or --concurrency N; one")
    if concurrency is not None:
        given = {"--arrival": arrival, "--burstiness": burstiness, "--burst-size": burst_size}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{', '.join(wrong)}: goes with --rate; clients of --concurrency send when they are answered"
            )
        return [ClosedLoop(count) for count in _counts(concurrency)]
    _check_arrival(arrival, burstiness, burst_size)
    return [
        OpenLoop(number, (arrival or ArrivalName.poisson).value, burstiness or 1.0, burst_size or 1)
        for number in _rates(rate or "")
    ]


def _check_arrival(arrival: ArrivalName | None, burstiness: float | None, burst_size: int | None) -> None:
    if arrival == ArrivalName.burst:
        if burstiness is not None:
            raise UsageError("--burstiness is of --arrival poisson; bursts come at even times")
        if burst_size is None:
            raise UsageError("--arrival burst takes --burst-size N, requests that are sent at once")
    elif burst_size is not None:
        raise UsageError("--burst-size goes with --arrival burst")
    if burstiness is not None and not (burstiness > 0 and math.isfinite(burstiness)):
        raise UsageError(f"--burstiness {burstiness:g} is not above 0; 1 is a Poisson process")
    if burst_size is not None and burst_size < 1:
        raise UsageError(f"--burst-size {burst_size} is not 1 or more")


def parse_length_range(text: str, option: str) -> LengthRange:
    """A length or a range of lengths such as ``64..256``.

    Raises:
        UsageError: it is something else, or the range is empty.
    """
    low, dots, high = text.partition("..")
    try:
        found = LengthRange(int(low), int(high if dots else low))
    except ValueError:
        raise UsageError(f"{option} takes a length or a range such as 64..256, not {text!r}") from None
    if not 1 <= found.low <= found.high:
        raise UsageError(f"{option} {text}: lengths begin at 1, and the first is not above the second")
    return found


def parse_token_ids(text: str | None) -> Sequence[int] | None:
    """The ids of a range such as ``1000..9999``.

    Raises:
        UsageError: it is something else.
    """
    return None if text is None else range(*_half_open(parse_length_range(text, "--token-id-range")))


def _half_open(found: LengthRange) -> tuple[int, int]:
    return found.low, found.high + 1


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--concurrency takes numbers of clients such as 1,4,16, not {text!r}")
    return counts


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate > 0 for rate in rates):
        raise UsageError(f"--rate takes requests per second such as 0.5,1,2 or inf (all at once), not {text!r}")
    return rates
