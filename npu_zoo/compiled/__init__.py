"""The zoo's own library of CPU kernels in C++: its sources, how it is built, and whether it is there.

Nothing here imports torch. The library has a plain C interface; :mod:`npu_zoo.nn.kernels.compiled` calls it.
"""
