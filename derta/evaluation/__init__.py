"""Evaluation of models: attack success, over-refusal, refusal curves, and reports.

Names are imported on first use: a training run, which reads refusal curves, needs no matplotlib.
"""

from derta._lazy import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __file__)
