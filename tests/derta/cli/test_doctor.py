"""`derta doctor` on machines that this one is not."""

from __future__ import annotations

import pytest
import torch

from derta.cli.doctor import report
from derta_kernels.triton_support import no_triton


def test_it_says_why_triton_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    no_triton.cache_clear()
    said = report()
    no_triton.cache_clear()
    assert "  head_loss           triton: the fastest here" in said
    assert "  interval_attention  sdpa: torch's kernels" in said
    assert "not triton, as Triton 3.6.0 omits fences between copies and products" in said
