"""Attention backends: paged, and contiguous per sequence, in plain torch and by the compiled library.

Those in plain torch keep keys and values in blocks (:mod:`~npu_zoo.nn.attention.cache`) and split a step in three kinds
of work: single tokens (:mod:`~npu_zoo.nn.attention.decode`), prompts and chunks of prompts
(:mod:`~npu_zoo.nn.attention.prefill`), and prefixes that many rows share (:mod:`~npu_zoo.nn.attention.sharing`).
Those of the library (:mod:`~npu_zoo.nn.attention.compiled`) hand it the step as it is, shared prefixes included.
"""
