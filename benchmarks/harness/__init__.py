"""Harness: measures the implementations of a question, interleaved, and records them."""
