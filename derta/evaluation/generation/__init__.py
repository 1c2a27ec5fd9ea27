"""Generation of answers by local and served models, stored as they arrive."""
