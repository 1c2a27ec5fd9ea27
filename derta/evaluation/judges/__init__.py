"""Judges of answers: keywords, local models and served models."""
