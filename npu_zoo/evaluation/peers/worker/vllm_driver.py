"""vLLM's offline engine.

The names are those of its documentation: https://docs.vllm.ai/en/stable/api/vllm/v1/engine/llm_engine.html and, for
the CPU build's variables, https://docs.vllm.ai/en/stable/getting_started/installation/cpu.html.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from .driver import Driver, Generated, LoadOptions, OnTokens, Request


class VllmDriver(Driver):
    """``vllm.LLM`` whose engine is stepped in this process; settings are further arguments of ``LLM``."""

    def load(self, options: LoadOptions) -> None:
        """See :meth:`Driver.load`."""
        os.environ.update(environment(options))
        self.vllm: Any = importlib.import_module("vllm")
        arguments: dict[str, Any] = {
            "model": options.weights,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": max(options.max_num_batched_tokens, options.max_model_len),
            "seed": 0,
            "disable_log_stats": True,
        }
        self.engine: Any = self.vllm.LLM(**{**arguments, **options.settings}).llm_engine

    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        """See :meth:`Driver.generate`; batches are continuous."""
        for index, request in enumerate(requests):
            text = isinstance(request.prompt, str)
            prompt: Any = request.prompt if text else {"prompt_token_ids": request.prompt}
            self.engine.add_request(str(index), prompt, self._params(request))
        token_ids: list[list[int]] = [[] for _ in requests]
        cached, held = 0, self._held()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                got = token_ids[int(output.request_id)]
                if output.outputs[0].token_ids:
                    got.extend(output.outputs[0].token_ids)
                    on_tokens(output.request_id, len(got))
                cached += (output.num_cached_tokens or 0) if output.finished else 0
        return Generated(token_ids, cached, sum(getattr(request, "num_preemptions", 0) for request in held))

    def _held(self) -> list[Any]:
        """The scheduler's own requests, which count their preemptions; none where this version has no such place."""
        core = getattr(getattr(self.engine, "engine_core", None), "engine_core", None)
        return list(getattr(getattr(core, "scheduler", None), "requests", {}).values())

    def _params(self, request: Request) -> Any:
        return self.vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )


def environment(options: LoadOptions) -> dict[str, str]:
    """The variables that vLLM has to find when it is imported."""
    found = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if options.device != "cpu":
        return found
    # It takes whole GiB.
    found["VLLM_CPU_KVCACHE_SPACE"] = str(-(-options.kv_cache_memory // 2**30))
    if hasattr(os, "sched_getaffinity"):
        found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return found
