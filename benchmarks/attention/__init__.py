"""Benchmark: attention over packs and its peers."""
