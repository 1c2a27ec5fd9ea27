"""Decoupled Refusal Training (arXiv 2407.09121) in one forward pass and without logits.

Names are imported on first use: `import derta` costs nothing, and `derta.derta_loss` needs neither
transformers nor datasets.
"""

from derta._lazy import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __file__)
