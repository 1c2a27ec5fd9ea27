"""The work of a forward pass by the length of a sequence, from a model's config alone."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedConfig


def forward_operations(config: PreTrainedConfig, lengths: np.ndarray) -> np.ndarray:
    """Estimate the floating-point operations of a forward pass over each sequence.

    For a sequence of n tokens, with layers of width d, H heads and G key-value heads of D each, an
    inner width I of the gated MLP, and E experts that a token goes to (1 without experts):

        operations = sum over layers of  2 n (2 (H + G) D d + 3 E I d)  +  4 H D pairs
        pairs      = m (m + 1) / 2 + (n - m) w    with m = min(n, w), and w the layer's window

    The first term is that of the matrices, the second that of the attention. The head is left out:
    how many rows meet it is not known from the length. A backward pass takes twice as much of both.
    A triple is counted as one sequence; its branches see less.

    Args:
        config: config of a decoder-only model.
        lengths: (examples,) int64.

    Returns:
        (examples,) float64.
    """
    text = config.get_text_config(decoder=True)
    width, heads, layers = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or width // heads
    inner = getattr(text, "intermediate_size", None) or 4 * width
    if experts := getattr(text, "num_experts_per_tok", None):
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
    matrices = 2 * (heads + groups) * size * width + 3 * inner * width
    tokens = np.asarray(lengths, np.float64)

    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    windowed = kinds.count("sliding_attention") if window else 0
    seen = (layers - windowed) * _pairs(tokens, tokens)
    if window:
        seen += windowed * _pairs(tokens, np.minimum(tokens, window))
    return 2 * layers * matrices * tokens + 4 * heads * size * seen


def _pairs(tokens: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return the pairs of a query and a key that it sees; a window is at most the tokens."""
    return window * (window + 1) / 2 + (tokens - window) * window
