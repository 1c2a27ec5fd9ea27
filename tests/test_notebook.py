"""The quick-start notebook runs from top to bottom, and its model learns to refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None = None) -> dict[str, Any]:
    """Run the code cells in one namespace, with other numbers of steps if `steps` is given."""
    monkeypatch.chdir(folder)
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(code_cells()):
        code = "".join(cell["source"])
        if steps is not None:
            code = re.sub(r"^(\w+_STEPS) = \d+$", rf"\1 = {steps}", code, flags=re.MULTILINE)
        exec(compile(code, f"cell {number}", "exec"), namespace)
    matplotlib.pyplot.close("all")
    return namespace


def test_the_notebook_is_kept_without_outputs() -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_cells())


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run(tmp_path, monkeypatch, steps=1)
    assert ran["trainer"].state.global_step == 1
    assert len(ran["axes"].lines) == 4


@pytest.mark.slow
def test_the_model_learns_to_refuse_harmful_responses_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(tmp_path, monkeypatch)
    harmful_before, _ = (np.concatenate(curves).mean() for curves in ran["before"])
    harmful, helpful = (np.concatenate(curves).mean() for curves in ran["after"])
    assert harmful_before < 0.01
    assert harmful > 0.9
    assert helpful < 0.05
