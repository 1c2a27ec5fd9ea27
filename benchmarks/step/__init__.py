"""Benchmark: a whole training step."""
