"""Decode steps that are prepared once for each batch size: captured graphs on an NPU, recorded calls on a CPU."""
