"""transformers' ``generate``."""

from __future__ import annotations

from typing import Any

from .driver import Driver, Generated, LoadOptions, OnTokens, Request, static_batches


class TransformersDriver(Driver):
    """Static batches, left-padded, sdpa attention, the default cache, no compilation.

    Settings: ``experts_implementation`` as ``from_pretrained`` takes it.
    """

    def load(self, options: LoadOptions) -> None:
        """See :meth:`Driver.load`."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        if options.threads:
            torch.set_num_threads(options.threads)
        if options.device == "npu":
            import torch_npu  # noqa: F401
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.weights)
        # The library's own types do not pass a strict check.
        factory: Any = AutoModelForCausalLM
        generation_config: Any = GenerationConfig
        dtype = getattr(torch, options.dtype)
        model = factory.from_pretrained(options.weights, dtype=dtype, attn_implementation="sdpa", **options.settings)
        self.model: Any = model.to(options.device).eval()
        # Padded positions are masked, so any id of the vocabulary does.
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        # Without an end-of-text id nothing is checked or masked per step, so ignoring it costs nothing.
        self.model.generation_config = generation_config(do_sample=False, pad_token_id=self.pad_token_id)

    def generate(self, requests: list[Request], static_batch: int, on_tokens: OnTokens) -> Generated:
        """See :meth:`Driver.generate`; a batch runs to its longest output."""
        token_ids: list[list[int]] = [[] for _ in requests]
        for batch in static_batches(requests, static_batch):
            outputs = self._generate_batch(batch, requests, on_tokens)
            for index, ids in zip(batch, outputs, strict=True):
                token_ids[index] = ids
        return Generated(token_ids)

    def _generate_batch(self, batch: list[int], requests: list[Request], on_tokens: OnTokens) -> list[list[int]]:
        import torch

        prompts = [self._ids(requests[index].prompt) for index in batch]
        wanted = [requests[index].max_tokens for index in batch]
        ids, mask = left_pad(prompts, self.pad_token_id)
        streamer = _Streamer(list(zip(batch, wanted, strict=True)), on_tokens)
        with torch.inference_mode():
            sequences = self.model.generate(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                max_new_tokens=max(wanted),
                streamer=streamer,
            )
        width = len(ids[0])
        return [row[width : width + count] for row, count in zip(sequences.tolist(), wanted, strict=True)]

    def cache_bytes(self, requests: list[Request]) -> float:
        """See :meth:`Driver.cache_bytes`; measured after the last token."""
        import torch

        ids = torch.tensor([self._ids(request.prompt) for request in requests], device=self.model.device)
        done = self.model.generate(
            input_ids=ids, max_new_tokens=requests[0].max_tokens, return_dict_in_generate=True, use_cache=True
        )
        return _bytes_per_token(done.past_key_values)

    def _ids(self, prompt: list[int] | str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt


def _bytes_per_token(cache: Any) -> float:
    rows, _, tokens, _ = cache.layers[0].keys.shape
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in held) / (rows * tokens))


class _Streamer:
    """Tells the tokens of a static batch; what a row gets beyond its own length is nobody's."""

    def __init__(self, rows: list[tuple[int, int]], on_tokens: OnTokens) -> None:
        self.rows = rows
        self.on_tokens = on_tokens
        self.count = -1

    def put(self, value: object) -> None:
        # The first call brings the prompts.
        self.count += 1
        for index, wanted in self.rows:
            if 0 < self.count <= wanted:
                self.on_tokens(index, self.count)

    def end(self) -> None:
        """Nothing is buffered."""


def left_pad(prompts: list[list[int]], pad_token_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of equal length, padded on the left, and their attention mask."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return ids, mask
