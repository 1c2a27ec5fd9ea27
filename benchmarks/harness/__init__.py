"""Harness: measure a question's implementations in turns and record the results."""
