"""The interpreter that tests run kernels in computes the same as Triton's own."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("kernels run on the GPU, not in the interpreter", allow_module_level=True)

from triton.runtime import interpreter

import quick_interpreter
from derta_kernels.attention import interval_attention
from packs import packed, tensors, with_gradients


def test_it_computes_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(heads=2, kv_heads=1, width=6, value_width=6)
    arguments = tensors(packed([(20, [(9, 4)])]), dtype=torch.float32, **sizes)

    def results() -> list[torch.Tensor]:
        output = interval_attention(**arguments, window=5, softcap=1.5, impl="triton")
        return with_gradients(output, [arguments[name] for name in "qkv"])

    quick = results()
    assert interpreter.InterpretedFunction.__call__ is not quick_interpreter.TRITONS_CALL
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", quick_interpreter.TRITONS_CALL)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", quick_interpreter.TRITONS_OPTIONS)
    for ours, theirs in zip(quick, results(), strict=True):
        assert torch.equal(ours, theirs)
