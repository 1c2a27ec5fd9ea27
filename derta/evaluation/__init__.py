"""Evaluation: attack success, over-refusal, refusal curves, and a report of them."""

from __future__ import annotations

from derta.evaluation.answers import AnswerFile, ModelGenerator, fingerprint
from derta.evaluation.curve import detector_auc, forced_rates, mean_curve
from derta.evaluation.evaluate import EvaluationSettings, evaluate_model
from derta.evaluation.generate import generate
from derta.evaluation.judge import Exchange, Judge, KeywordJudge, Verdict
from derta.evaluation.report import format_table, write_report
from derta.evaluation.results import Outcome, VariantResult, pool, summarize
from derta.evaluation.scenarios import EvaluationData, Scenario, Trial, scenarios
from derta.evaluation.statistics import roc_auc, wilson_interval
from derta.evaluation.teacher_forcing import (
    find_refusal_token,
    perplexity,
    refusal_curve,
    refusal_curves,
    response,
)

__all__ = [
    "AnswerFile",
    "EvaluationData",
    "EvaluationSettings",
    "Exchange",
    "Judge",
    "KeywordJudge",
    "ModelGenerator",
    "Outcome",
    "Scenario",
    "Trial",
    "VariantResult",
    "Verdict",
    "detector_auc",
    "evaluate_model",
    "find_refusal_token",
    "fingerprint",
    "forced_rates",
    "format_table",
    "generate",
    "mean_curve",
    "perplexity",
    "pool",
    "refusal_curve",
    "refusal_curves",
    "response",
    "roc_auc",
    "scenarios",
    "summarize",
    "wilson_interval",
    "write_report",
]
