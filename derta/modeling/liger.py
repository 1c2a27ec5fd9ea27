"""Liger's layers: the losses to switch off, and a run of the layers without storage."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from derta.modeling.mlp_tiling import ROUTED

# Liger's losses replace the model's forward, which packs need.
LIGER_LOSSES_OFF = {"fused_linear_cross_entropy": False, "cross_entropy": False}


@contextlib.contextmanager
def liger_layers(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with Liger's layers, as `use_liger_kernel: true` does, but launch no kernel.

    Liger's functions allocate their results and launch kernels that fill them; inside this context
    Triton launches none. The model keeps its own experts, because the memory of Liger's experts
    depends on the routing of tokens. Replacements in the family's module are undone afterwards;
    those in `model` stay.
    """
    from triton.runtime.jit import KernelInterface

    # Liger warns about every backend that is not installed.
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
