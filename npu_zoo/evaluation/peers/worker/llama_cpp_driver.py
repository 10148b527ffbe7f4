"""llama.cpp through llama-cpp-python's low-level API.

The names are those of llama.h, as https://llama-cpp-python.readthedocs.io/en/latest/api-reference/ lists them.
"""

from __future__ import annotations

import importlib
from typing import Any

from .driver import Driver, Generated, LoadOptions, OnTokens, Request, static_batches

SHARED_LEAST = 64
"""Tokens of a prefix that is worth a copy of its keys and values."""


class LlamaCppDriver(Driver):
    """Static batches that each sequence leaves when it is done; what all prompts of one begin with is computed once.

    ``weights`` is a GGUF file, whose dtype is what computes, and keys and values are float16, as is the library's
    default. Settings are further fields of ``llama_context_params``.
    """

    def load(self, options: LoadOptions) -> None:
        """See :meth:`Driver.load`."""
        self.api: Any = importlib.import_module("llama_cpp")
        self.options = options
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0 if options.device == "cpu" else 999
        self.model: Any = self.api.llama_model_load_from_file(options.weights.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {options.weights}; is it a GGUF file of an architecture it has?")
        self.vocab: Any = self.api.llama_model_get_vocab(self.model)
        self.vocab_size = int(self.api.llama_vocab_n_tokens(self.vocab))
        self.context: Any = None
        self.batch: Any = self.api.llama_batch_init(options.max_num_batched_tokens, 0, 1)
        self.room = (0, 0)

    def prepare(self, requests: list[Request], static_batch: int, longest: int = 0) -> None:
        """A context with as many sequences as a batch has, each with room for the longest; the model stays loaded."""
        sequences = max(map(len, static_batches(requests, static_batch)))
        length = max(longest, *(len(self._ids(request.prompt)) + request.max_tokens for request in requests))
        if self.room == (sequences, length):
            return
        if self.context:
            self.api.llama_free(self.context)
        self.room = (sequences, length)
        params = self.api.llama_context_default_params()
        fields = {"n_ctx": sequences * length, "n_seq_max": sequences, "n_batch": self.options.max_num_batched_tokens}
        if self.options.threads:
            fields |= {"n_threads": self.options.threads, "n_threads_batch": self.options.threads}
        for name, value in {**fields, **self.options.settings}.items():
            setattr(params, name, value)
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {sequences} sequences of {length} tokens")

    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        """See :meth:`Driver.generate`."""
        token_ids: list[list[int]] = [[] for _ in requests]
        for members in static_batches(requests, static_batch):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
            self._run_batch([(index, requests[index]) for index in members], token_ids, on_tokens)
        return Generated(token_ids)

    def _run_batch(self, members: list[tuple[int, Request]], token_ids: list[list[int]], on_tokens: OnTokens) -> None:
        """Prompts first, then a token of each sequence a step, until all have theirs."""
        prompts = [self._ids(request.prompt) for _, request in members]
        shared = self._share_prefix(prompts)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= shared
        ]
        while rows:
            following: list[tuple[int, int, int, bool]] = []
            for token, sequence in self._decode(rows):
                index, request = members[sequence]
                got = token_ids[index]
                got.append(token)
                on_tokens(index, len(got))
                if len(got) < request.max_tokens:
                    following.append((token, len(prompts[sequence]) + len(got) - 1, sequence, True))
            rows = following

    def _share_prefix(self, prompts: list[list[int]]) -> int:
        """Compute what all prompts begin with, once, and give it to each sequence; how many tokens that are."""
        length = common_prefix(prompts)
        if len(prompts) < 2 or length < SHARED_LEAST:
            return 0
        self._decode([(token, position, 0, False) for position, token in enumerate(prompts[0][:length])])
        memory = self.api.llama_get_memory(self.context)
        for sequence in range(1, len(prompts)):
            # Whole sequences, since each has a buffer of its own.
            self.api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        return length

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Compute rows of (token, position, sequence, whether a token follows); tokens and their sequences."""
        size, found = self.options.max_num_batched_tokens, []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            self._fill(part)
            code = self.api.llama_decode(self.context, self.batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code} for {len(part)} tokens")
            found += [(self._argmax(row), item[2]) for row, item in enumerate(part) if item[3]]
        return found

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, sampled) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = sampled

    def _argmax(self, row: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocab_size,))))

    def _ids(self, prompt: list[int] | str) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        text = prompt.encode()
        room = len(text) + 2
        tokens = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, text, len(text), tokens, room, True, False)
        return list(tokens[:count])


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own, which its first token follows."""
    least = min(map(len, prompts)) - 1
    first = prompts[0]
    return next((i for i in range(least) if any(prompt[i] != first[i] for prompt in prompts)), least)
