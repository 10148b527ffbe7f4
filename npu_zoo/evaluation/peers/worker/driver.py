"""The engines behind one interface. An engine is imported on loading, which is part of a start-up's time."""

from __future__ import annotations

import gc
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from .timeline import Event, Run, summarise

OnTokens = Callable[[Hashable, int], None]
"""Called with a request's key and its output tokens so far, whenever it gets one."""


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids or (where tokenizing is part of the case) as text; exactly ``max_tokens`` come back."""

    prompt: list[int] | str
    max_tokens: int


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is started.

    Attributes:
        weights: the checkpoint directory; llama.cpp's GGUF file.
        device: cpu, cuda or npu, where the engine leaves the choice to its caller.
        threads: CPU threads; None leaves it to the engine.
        kv_cache_memory: bytes for keys and values, for engines that allocate them at once.
        settings: what only this engine takes.
    """

    weights: str
    dtype: str
    max_model_len: int
    device: str = "cpu"
    threads: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory: int = 2**30
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """What came of requests.

    Attributes:
        token_ids: output ids per request, in the requests' order.
        cached_tokens: prompt tokens that came from a prefix cache.
        preemptions: how often a request lost its room and was computed again, as far as the engine tells.
        spans: when the model's own steps began and ended, on the machine's monotonic clock; empty where the engine does
            not tell.
    """

    token_ids: list[list[int]]
    cached_tokens: int = 0
    preemptions: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)


class Driver(ABC):
    """Generates greedily, past any end-of-text token, exactly as many tokens as are asked for."""

    @abstractmethod
    def load(self, options: LoadOptions) -> None:
        """Import, read the weights, be ready to generate."""

    @abstractmethod
    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        """Run the requests to their ends.

        Args:
            static_batch: rows of one batch where the driver cannot batch continuously; 0 takes all at once.
        """

    def prepare(  # noqa: B027 (most need no room made)
        self, requests: list[Request], static_batch: int, longest: int = 0
    ) -> None:
        """Make room for requests; this is not timed.

        Args:
            longest: tokens that each sequence gets room for at least, so that a warm-up leaves what later runs need.
        """

    def cache_bytes(self, requests: list[Request]) -> float:
        """Bytes of the cache's tensors over the tokens that they hold, or have room for, with these requests.

        Raises:
            NotImplementedError: the engine does not tell.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell the size of its cache")

    def run(self, requests: list[Request], static_batch: int = 0, longest: int = 0) -> Run:
        """Generate and take the times; see :meth:`prepare` and :meth:`generate`."""
        self.prepare(requests, static_batch, longest)
        gc.collect()
        events: list[Event] = []

        def on_tokens(request: Hashable, count: int) -> None:
            events.append((time.monotonic(), request, count))

        start = time.monotonic()
        generated = self.generate(requests, static_batch, on_tokens)
        told = generated.cached_tokens, generated.preemptions, generated.spans
        return summarise(start, events, generated.token_ids, *told)


DRIVERS = {
    "npu-zoo": ("npu_zoo_driver", "NpuZooDriver"),
    "transformers": ("transformers_driver", "TransformersDriver"),
    "vllm": ("vllm_driver", "VllmDriver"),
    "llama.cpp": ("llama_cpp_driver", "LlamaCppDriver"),
}
"""Each engine's module beside this one, and its class there."""


def make_driver(engine: str) -> Driver:
    """An engine's driver; only its own module is imported.

    Raises:
        ValueError: there is no such engine.
    """
    if engine not in DRIVERS:
        raise ValueError(f"no engine '{engine}'; known: {', '.join(DRIVERS)}")
    module, name = DRIVERS[engine]
    driver: Driver = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
    return driver


def static_batches(requests: list[Request], size: int) -> list[list[int]]:
    """Requests' positions in batches: sorted by output length, since a batch runs to its longest output.

    Estimated from a CPU's prefill and decode rates, this costs no more than sorting by prompt length or by the sum
    does, at batches of 8 and 16.
    """
    if not size or size >= len(requests):
        return [list(range(len(requests)))]
    order = sorted(range(len(requests)), key=lambda index: requests[index].max_tokens)
    return [order[start : start + size] for start in range(0, len(order), size)]
