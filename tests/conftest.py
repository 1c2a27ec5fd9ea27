"""What holds for all tests: Triton's interpreter without a GPU, and poisoned allocations.

Triton asks for its interpreter at its first import, so this stands before every test module.
Ahead-of-time compilation, which the interpreter excludes, is tested in processes of its own. With
DERTA_PTX=90 the kernels are compiled for compute capability 9.0 and run by `ptx` instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run: what turns a test red is a change, not a draw.
    settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True)
    settings.register_profile("thorough", max_examples=1000, deadline=None, derandomize=True)
    settings.load_profile("quick")
if "DERTA_PTX" in os.environ:
    pytest_plugins = ["ptx.plugin"]
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Carry promises into the records of a run. A test of many cases records their number too."""
    for item in items:
        if promise := item.get_closest_marker("promise"):
            item.user_properties.append(("promise", promise.args[0]))


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Fill what `torch.empty` and its kind hand out, within torch too: NaN, or the largest integer.

    Fresh memory is mostly zeros, which hide that nobody wrote them. `torch.utils.deterministic`
    fills it in this mode.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
