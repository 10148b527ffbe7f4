"""The process of one engine under comparison: drives it, takes the times, answers over a pipe.

It needs the standard library and the engine alone, so that it runs by its path in the engine's own environment, where
npu-zoo may not be installed. Its modules import each other relatively, since there it is no part of ``npu_zoo``.
"""
