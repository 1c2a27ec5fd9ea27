"""A pytest plugin: kernels run as compiled for DERTA_PTX, and a test with a hazard fails.

DERTA_PTX is a compute capability (90 for 9.0), DERTA_PTX_OPTIONS a list of `processor.Options`,
such as `contract=True,approx_ulp=2`.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

os.environ.pop("TRITON_INTERPRET", None)

from ptx import compiled

_given = ast.parse(f"dict({os.environ.get('DERTA_PTX_OPTIONS', '')})", mode="eval").body
_options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in _given.keywords}
_held = ExitStack()
# From here on: modules of tests ask at their import what can run.
runs = _held.enter_context(compiled.kernels(int(os.environ["DERTA_PTX"]), **_options))


@pytest.fixture(autouse=True)
def no_hazards() -> Iterator[None]:
    """Fail a test whose launches are not what a GPU computes alike in every run."""
    runs.clear()
    yield
    if found := [fault for run in runs for fault in run.faults()]:
        pytest.fail("\n".join(found[:5]))
