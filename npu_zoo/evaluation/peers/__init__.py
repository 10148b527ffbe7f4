"""The same work on npu-zoo and on other engines, alternating in one run."""
