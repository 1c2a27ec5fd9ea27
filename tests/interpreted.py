"""Triton's interpreter: if it is on, and why it takes no bfloat16."""

from __future__ import annotations

import os

INTERPRETED = "TRITON_INTERPRET" in os.environ
TRUNCATES = "Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest"
