"""What holds for all tests: Triton's interpreter without a GPU, and poisoned allocations.

Triton asks for its interpreter at its first import, so this stands before every test module.
Ahead-of-time compilation, which the interpreter excludes, is tested in processes of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Fill what `torch.empty` and its kind hand out, within torch too: NaN, or the largest integer.

    Fresh memory is mostly zeros, which hide that nobody wrote them. `torch.utils.deterministic`
    fills it in this mode.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
