"""A stand-in for hypothesis: if it is not installed, only the tests that use it are skipped.

Without the stand-in, no module with such a test could be collected.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError:
    stand_in = MagicMock()
    stand_in.given.return_value = pytest.mark.skip(reason="hypothesis is not installed")
    stand_in.settings.return_value = stand_in.example.return_value = lambda test: test
    stand_in.__spec__ = ModuleSpec("hypothesis", None)  # torch looks for it
    sys.modules["hypothesis"] = stand_in
