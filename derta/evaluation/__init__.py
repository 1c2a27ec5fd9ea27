"""Evaluation: attack success, over-refusal, refusal curves, and a report of them.

What draws is loaded on first use, so that a training run, which reads curves, needs no matplotlib.
The other names are not: some are those of modules here too, which would be found in their place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from derta.evaluation.answers import AnswerFile, fingerprint
from derta.evaluation.calibration import calibrate, read_labelled
from derta.evaluation.curve import detector_auc, forced_rates, mean_curve
from derta.evaluation.evaluate import (
    Answered,
    EvaluationSettings,
    collect_answers,
    evaluate_model,
    judge_answers,
)
from derta.evaluation.generate import ModelGenerator, generate
from derta.evaluation.judge import Exchange, Judge, KeywordJudge, Verdict
from derta.evaluation.model_judges import ClassifierJudge, ModelJudge
from derta.evaluation.results import Outcome, VariantResult, pool, summarize
from derta.evaluation.rubrics import RUBRICS, Rubric, paper_rubric
from derta.evaluation.scenarios import EvaluationData, Scenario, Trial, scenarios
from derta.evaluation.server import Server, ServerGenerator, ServerSettings
from derta.evaluation.server_judge import ServerJudge
from derta.evaluation.statistics import newcombe_interval, roc_auc, wilson_interval
from derta.evaluation.teacher_forcing import (
    find_refusal_token,
    perplexity,
    refusal_curve,
    refusal_curves,
    response,
)

if TYPE_CHECKING:
    from derta.evaluation.comparison import compare, format_comparison, write_comparison
    from derta.evaluation.report import format_table, format_undecided, write_report

_DRAWING = {
    "compare": "derta.evaluation.comparison",
    "format_comparison": "derta.evaluation.comparison",
    "write_comparison": "derta.evaluation.comparison",
    "format_table": "derta.evaluation.report",
    "format_undecided": "derta.evaluation.report",
    "write_report": "derta.evaluation.report",
}

__all__ = [
    "RUBRICS",
    "AnswerFile",
    "Answered",
    "ClassifierJudge",
    "EvaluationData",
    "EvaluationSettings",
    "Exchange",
    "Judge",
    "KeywordJudge",
    "ModelGenerator",
    "ModelJudge",
    "Outcome",
    "Rubric",
    "Scenario",
    "Server",
    "ServerGenerator",
    "ServerJudge",
    "ServerSettings",
    "Trial",
    "VariantResult",
    "Verdict",
    "calibrate",
    "collect_answers",
    "compare",
    "detector_auc",
    "evaluate_model",
    "find_refusal_token",
    "fingerprint",
    "forced_rates",
    "format_comparison",
    "format_table",
    "format_undecided",
    "generate",
    "judge_answers",
    "mean_curve",
    "newcombe_interval",
    "paper_rubric",
    "perplexity",
    "pool",
    "read_labelled",
    "refusal_curve",
    "refusal_curves",
    "response",
    "roc_auc",
    "scenarios",
    "summarize",
    "wilson_interval",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _DRAWING:
        raise AttributeError(f"module 'derta.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(_DRAWING[name]), name)
