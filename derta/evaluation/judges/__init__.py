"""Judges: keywords, local models and served models that label answers."""
