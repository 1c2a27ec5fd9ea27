"""Objectives: which rows of a pack have which targets, and the terms of the loss.

`base` says what an objective is, `derta` is the paper's, `unlikelihood` adds a term to it,
`preference` compares pairs, `red_flag` trains a token of its own and keeps the rest.
"""
