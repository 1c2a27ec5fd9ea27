"""Benchmark: the head loss and its peers."""
