"""Attention backends in plain torch: paged, and contiguous per sequence.

Both keep keys and values in blocks (:mod:`~npu_zoo.nn.attention.cache`) and split a step in three kinds of work:
single tokens (:mod:`~npu_zoo.nn.attention.decode`), prompts and chunks of prompts
(:mod:`~npu_zoo.nn.attention.prefill`), and prefixes that many rows share (:mod:`~npu_zoo.nn.attention.sharing`).
"""
