"""What the benchmarks share: cases, checkpoints, systems under test, workers, machine figures, reports."""
