"""Evaluation: attack success, over-refusal, refusal curves, and a report of them."""

from __future__ import annotations

from derta.evaluation.analyses import first_tokens, refusal_positions, terms
from derta.evaluation.answers import AnswerFile, ModelGenerator, fingerprint
from derta.evaluation.comparison import compare, format_comparison, write_comparison
from derta.evaluation.curve import detector_auc, forced_rates, mean_curve
from derta.evaluation.evaluate import EvaluationSettings, evaluate_model
from derta.evaluation.generate import generate
from derta.evaluation.judge import Exchange, Judge, KeywordJudge, Verdict
from derta.evaluation.official_results import official_entry
from derta.evaluation.report import format_table, format_undecided, write_report
from derta.evaluation.results import Outcome, VariantResult, pool, summarize
from derta.evaluation.scenarios import EvaluationData, Scenario, Trial, scenarios
from derta.evaluation.statistics import newcombe_interval, roc_auc, wilson_interval
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
    "compare",
    "detector_auc",
    "evaluate_model",
    "find_refusal_token",
    "fingerprint",
    "first_tokens",
    "forced_rates",
    "format_comparison",
    "format_table",
    "format_undecided",
    "generate",
    "mean_curve",
    "newcombe_interval",
    "official_entry",
    "perplexity",
    "pool",
    "refusal_curve",
    "refusal_curves",
    "refusal_positions",
    "response",
    "roc_auc",
    "scenarios",
    "summarize",
    "terms",
    "wilson_interval",
    "write_comparison",
    "write_report",
]
