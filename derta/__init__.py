"""Decoupled Refusal Training (arXiv 2407.09121) in one forward pass and without logits."""
