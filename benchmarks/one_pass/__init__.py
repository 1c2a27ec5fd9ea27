"""Benchmark: one pass over a pack and separate passes."""
