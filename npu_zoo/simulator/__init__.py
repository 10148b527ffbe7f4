"""A simulated Ascend runtime under the real torch_npu."""
