"""What the simulated runtime is made of, tested without torch_npu beside torch; tests/npu runs the whole."""
