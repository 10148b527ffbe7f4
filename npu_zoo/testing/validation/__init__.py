"""Validation of plugins: every claim that their specs make, and whether it holds. Importing it imports no torch."""
