"""Checkpoints: reading them, and copying them into a model's parameters."""
