"""Liger's layers: which of its losses stay off, and a run of its layers without storage."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from derta.modeling.mlp_tiling import ROUTED

# Liger's losses replace the model's forward, and with it the one that packs need.
LIGER_LOSSES_OFF = {"fused_linear_cross_entropy": False, "cross_entropy": False}


@contextlib.contextmanager
def liger_layers(model: PreTrainedModel) -> Iterator[None]:
    """Runs the model by Liger's layers within, as `use_liger_kernel: true` does, kernels left out.

    Liger's functions allocate their results themselves and launch kernels that fill them; here
    Triton launches none. Experts stay the model's own: what Liger's hold depends on how tokens are
    routed. What Liger puts in place of others in the family's module is gone afterwards, what it
    puts into `model` stays.
    """
    from triton.runtime.jit import KernelInterface

    # It warns of every backend that is not installed.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    family = vars(sys.modules[type(model).__module__])
    before, launch = dict(family), KernelInterface.__getitem__
    routed = any(hasattr(module, name) for module in model.modules() for name in ROUTED)
    try:
        apply_liger_kernel(model, LIGER_LOSSES_OFF | {"swiglu": not routed})
        KernelInterface.__getitem__ = lambda kernel, grid: _nothing
        yield
    finally:
        KernelInterface.__getitem__ = launch
        family.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None: ...
