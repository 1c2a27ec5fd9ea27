"""Measures: rates with their intervals, refusal curves, and the results of a variant."""
