"""Kernels for CPUs in C++, of the library that :mod:`npu_zoo.compiled` builds."""
