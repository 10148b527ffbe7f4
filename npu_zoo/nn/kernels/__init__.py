"""Implementations of operations: the plain reference, and one module per chip."""
