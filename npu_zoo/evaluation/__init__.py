"""Measures performance and accuracy: benchmarks, evaluations, and the records that come of them."""
