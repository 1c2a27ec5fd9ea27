"""Packs: encoded examples laid end to end, and the steps of a run made of them."""
