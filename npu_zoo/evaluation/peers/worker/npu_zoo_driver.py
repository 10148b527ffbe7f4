"""npu-zoo's own engine."""

from __future__ import annotations

import time
from typing import Any

from .driver import Driver, Generated, LoadOptions, OnTokens, Request


class NpuZooDriver(Driver):
    """``npu_zoo.LLM``, with the fields of its EngineArgs as settings."""

    def load(self, options: LoadOptions) -> None:
        """See :meth:`Driver.load`."""
        from npu_zoo import LLM

        sizes = {
            "weights": options.weights,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "kv_cache_memory": options.kv_cache_memory,
            "threads": options.threads,
        }
        self.llm: Any = LLM(**{**options.settings, **sizes})
        self.spans: list[tuple[float, float]] = []
        # A device works on after its call has returned, so that calls tell nothing of it.
        if options.device == "cpu":
            engine: Any = self.llm.engine
            self._take_times(engine.runner)

    def _take_times(self, runner: Any) -> None:
        """Keep when each of the model's steps begins and ends."""
        execute = runner.execute

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.monotonic()
            try:
                return execute(*arguments, **named)
            finally:
                self.spans.append((start, time.monotonic()))

        runner.execute = timed

    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        """See :meth:`Driver.generate`; batches are continuous."""
        from npu_zoo import SamplingParams

        prompts = [request.prompt for request in requests]
        params = [SamplingParams(temperature=0.0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        seen: dict[str, int] = {}
        self.spans.clear()

        def on_output(output: Any) -> None:
            count = len(output.outputs[0].token_ids)
            if count > seen.get(output.request_id, 0):
                seen[output.request_id] = count
                on_tokens(output.request_id, count)

        outputs = self.llm.generate(prompts, params, on_output=on_output)
        cached = sum(output.metrics.cached_tokens for output in outputs)
        preemptions = sum(output.metrics.preemptions for output in outputs)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return Generated(token_ids, cached, preemptions, list(self.spans))

    def cache_bytes(self, requests: list[Request]) -> float:
        """See :meth:`Driver.cache_bytes`; the cache is allocated at once, for as many tokens as it has room for."""
        import torch

        attention = self.llm.engine.runner.attention
        # Latents are the backend's own tensor, keys and values those of its cache.
        held = vars(getattr(attention, "cache", attention)).values()
        size = sum(value.untyped_storage().nbytes() for value in held if isinstance(value, torch.Tensor))
        return float(size / self.llm.engine.explain()["kv_cache_tokens"])
