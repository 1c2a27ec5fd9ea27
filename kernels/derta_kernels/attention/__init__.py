"""Attention of packed batches, in which one integer per token says which queries see it."""

from derta_kernels.attention.choice import choose
from derta_kernels.attention.layout import Bounds, layout_of
from derta_kernels.attention.op import interval_attention

__all__ = ["Bounds", "choose", "interval_attention", "layout_of"]
