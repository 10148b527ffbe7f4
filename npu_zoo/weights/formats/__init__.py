"""Checkpoint formats as sources and targets of a conversion."""
