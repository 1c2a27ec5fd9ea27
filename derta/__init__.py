"""Decoupled Refusal Training (arXiv 2407.09121) in one forward pass and without logits.

Names are loaded on first use, so that `import derta` costs nothing and `derta.derta_loss` needs
neither transformers nor datasets.
"""

from __future__ import annotations

import importlib
from typing import Any

from derta._version import __version__

_HOME = {
    "derta_loss": "derta.loss",
    "derta_loss_with_rows": "derta.loss",
    "rto_loss": "derta.loss",
    "linear_cross_entropy": "derta.loss",
    "DertaLoss": "derta.loss",
    "RTOLoss": "derta.loss",
    "derta_labels": "derta.labels",
    "apply_derta": "derta.modeling",
    "remove_derta": "derta.modeling",
    "DertaConfig": "derta.config",
    "DertaTrainer": "derta.trainer",
    "DertaCollator": "derta.data",
    "Dialogue": "derta.data",
    "Encoder": "derta.data",
    "Triple": "derta.data",
    "read_records": "derta.data",
    "read_requests": "derta.data",
    "resolve_refusal_token": "derta.data",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'derta' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
