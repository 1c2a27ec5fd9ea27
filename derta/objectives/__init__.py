"""Objectives: which rows of a pack have which targets, and the terms of the loss."""
