"""A pytest plugin: kernels run as compiled for DERTA_PTX, and a test with a hazard fails.

DERTA_PTX is a compute capability (90 for 9.0), DERTA_PTX_OPTIONS a list of `processor.Options`,
such as `contract=True,approx_ulp=2`. With DERTA_PTX_SAMPLE, a number, only tests of the
Triton kernels run, and one case of each: in bfloat16 or float16, whose turn is it for that number.
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


NARROW = (torch.bfloat16, torch.float16)
TOO_LONG = "scan"  # a fixture: a scan of compiled tiles takes a row of 4,400 tokens


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draw the sample that DERTA_PTX_SAMPLE asks for."""
    if (turn := os.environ.get("DERTA_PTX_SAMPLE")) is None:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        fixtures = getattr(item, "fixturenames", ())
        of_kernels = given.get("impl") == "triton" or "head_dim" in given
        of_kernels |= "small_tiles" in fixtures and TOO_LONG not in fixtures
        of_kernels |= "multiprocessors" in given  # with tiles of its own
        if of_kernels and given.get("dtype") != torch.float32:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for test, found in cases.items():
        draw = random.Random(f"{test} {int(turn) // 2}")
        wanted = NARROW[(int(turn) + draw.randrange(2)) % 2]
        fitting = [one for one in found if _dtype(one) == wanted] or found
        kept.add(draw.choice(fitting))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _dtype(item: pytest.Item) -> object:
    return item.callspec.params.get("dtype") if hasattr(item, "callspec") else None


@pytest.fixture(autouse=True)
def no_hazards() -> Iterator[None]:
    """Fail a test whose launches are not what a GPU computes alike in every run."""
    runs.clear()
    yield
    if found := [fault for run in runs for fault in run.faults()]:
        pytest.fail("\n".join(found[:5]))
