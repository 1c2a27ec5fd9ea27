"""A pytest plugin: kernels run as compiled for DERTA_PTX, and a test with a hazard fails.

DERTA_PTX is a compute capability (90 for 9.0), DERTA_PTX_OPTIONS a list of `processor.Options`,
such as `contract=True,approx_ulp=2`. With DERTA_PTX_SAMPLE, a number that draws, only tests of the
Triton kernels run: of each that is not slow one case in bfloat16 and one in float16, or one case if
its cases have no dtype. They fail if no kernel is launched.
"""

from __future__ import annotations

import ast
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)

from ptx import compiled

_given = ast.parse(f"dict({os.environ.get('DERTA_PTX_OPTIONS', '')})", mode="eval").body
_options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in _given.keywords}
_held = ExitStack()
# From here on: modules of tests ask at their import what can run.
runs = _held.enter_context(compiled.kernels(int(os.environ["DERTA_PTX"]), **_options))


DTYPES = (torch.bfloat16, torch.float16, None)  # None: cases have no dtype
TOO_LONG = "scan"  # a fixture: a scan of compiled tiles takes a row of 4,400 tokens


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draw the sample that DERTA_PTX_SAMPLE asks for."""
    if (sample := os.environ.get("DERTA_PTX_SAMPLE")) is None:
        return
    cases: dict[tuple[str, object], list[pytest.Item]] = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        fixtures = getattr(item, "fixturenames", ())
        of_kernels = given.get("impl") == "triton"
        if "impl" not in given:
            of_kernels = "head_dim" in given or "multiprocessors" in given
            of_kernels |= "small_tiles" in fixtures and TOO_LONG not in fixtures
        dtype = given.get("dtype")
        if of_kernels and dtype in DTYPES and not item.get_closest_marker("slow"):
            cases.setdefault((item.nodeid.partition("[")[0], dtype), []).append(item)
    kept = {
        random.Random(f"{test} {dtype} {sample}").choice(found)
        for (test, dtype), found in cases.items()
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def no_hazards() -> Iterator[None]:
    """Fail a test whose launches are not what a GPU computes alike in every run, or has none."""
    runs.clear()
    yield
    if "DERTA_PTX_SAMPLE" in os.environ and not runs:
        pytest.fail("no kernel was launched")
    if found := [fault for run in runs for fault in run.faults()]:
        pytest.fail("\n".join(found[:5]))
