"""Generation: answers of local and served models, kept as they come."""
