"""Defaults and choices of what is read of data sets, stated once. Nothing heavy is imported."""

from typing import Literal

# The reading of a tokenizer's special tokens in the texts of records.
SpecialTokensInText = Literal["plain", "refuse", "keep"]
# The fate of a dialogue or a rendered row that is too long.
TooLong = Literal["skip", "truncate"]

# Share of common pairs of words from which two requests are near duplicates.
NEAR = 0.7
# Number of repeated requests of each kind that are listed.
LISTED = 20
# Time until a progress bar appears.
SHOWN_AFTER_S = 2.0
