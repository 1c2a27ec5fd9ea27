"""Benchmarks of this project against its peers; see benchmarks/README.md."""
