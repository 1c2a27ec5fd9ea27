"""Measures this project against others; see benchmarks/README.md."""
