"""The kernels of derta_kernels, swapped for what the compiler makes of them for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton

from derta_kernels.attention import (
    choice as attention_choice,
    launch_configs,
    triton_backward,
    triton_forward,
)
from derta_kernels.head_loss import (
    choice as head_choice,
    row_pass_triton,
    tile_product_triton,
)
from derta_kernels.launch import SHARED_KIB
from ptx.launches import Compiled, Run
from ptx.processor import Options

OUTPUTS = {
    "forward": ("out", "logsumexp"),
    "backward_queries": ("delta", "d_q"),
}


def outputs(kernel: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the arguments that a launch writes in full and reads nothing of."""
    if kernel == "tile_product":
        return () if arguments["IS_WEIGHT"] else ("product",)
    if kernel == "backward_keys":
        forms = {"d_k": "FORM_D_K", "d_v": "FORM_D_V"}
        return tuple(name for name, form in forms.items() if arguments[form])
    if kernel != "row_pass":
        return OUTPUTS[kernel]
    first = arguments["STAGE"] == row_pass_triton.FIRST_WALK.value
    if first:
        return ("summary",)
    return ("logsumexp", "nll", "blocks") if arguments["FORM_BLOCKS"] else ("logsumexp", "nll")


@contextmanager
def kernels(capability: int, **options: Any) -> Iterator[list[Run]]:
    """Run the Triton kernels for a compute capability (90 for 9.0), by `processor.Options`.

    The yielded list grows by a `Run` a launch.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    runs: list[Run] = []
    chip = launch_configs.chip(capability, SHARED_KIB[capability] * 1024)
    with (
        mock.patch.multiple(launch_configs, _chip_of=lambda device: chip),
        mock.patch.multiple(tile_product_triton, _capability=lambda device: capability),
    ):
        with mock.patch.multiple(attention_choice, no_triton=lambda device: None):
            with mock.patch.multiple(head_choice, no_triton=lambda device: None):
                with _swapped(capability, Options(**options), runs):
                    yield runs


@contextmanager
def _swapped(capability: int, options: Options, runs: list[Run]) -> Iterator[None]:
    places = (
        (row_pass_triton, "row_pass"),
        (tile_product_triton, "tile_product"),
        (triton_forward, "forward"),
        (triton_backward, "backward_queries"),
        (triton_backward, "backward_keys"),
    )
    old = [getattr(module, name) for module, name in places]
    for (module, name), kernel in zip(places, old, strict=True):
        made = Compiled(kernel, lambda a, name=name: outputs(name, a), capability, options, runs)
        setattr(module, name, made)
    try:
        yield
    finally:
        for (module, name), kernel in zip(places, old, strict=True):
            setattr(module, name, kernel)
