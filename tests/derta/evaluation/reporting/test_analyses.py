"""The paper's analyses agree with counts made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from derta.evaluation import Outcome, VariantResult, wilson_interval
from derta.evaluation.reporting.analyses import Rate, first_tokens, refusal_positions, terms


def entry(*outcomes: Outcome) -> dict[str, Any]:
    return VariantResult(outcomes=outcomes).to_dict()


def attacked(direct: int, completion: int | None = None, *, n: int = 10) -> dict[str, Any]:
    """Return the entry of a model on which `direct` of n attacks succeed."""
    outcomes = [Outcome("asr.direct", direct, n)]
    if completion is not None:
        outcomes.append(Outcome("asr.completion", completion, n))
    return entry(*outcomes)


def test_refusals_count_only_if_the_model_begins_the_response() -> None:
    models = {
        "model": entry(
            Outcome("asr.direct", 0, 4, positions=(0, 4, 5, 29)),
            Outcome("asr.prefill.0", 0, 1, positions=(30,)),
            Outcome("asr.prefill.4", 0, 2, positions=(4, 4)),
            Outcome("asr.prefilled", 0, 2, positions=(9, 9)),
            Outcome("asr.template_prefill.4", 0, 2, positions=(4, 4)),
            Outcome("asr.file.trials", 1, 2, positions=(31,)),
            Outcome("over_refusal", 1, 2, positions=(0,)),
        )
    }
    assert first_tokens(models) == {
        "model": {
            "direct": Rate(2, 4),
            "prefill.0": Rate(0, 1),
            "file.trials": Rate(0, 1),
            "all": Rate(2, 5, 5 / 4),
        }
    }
    assert refusal_positions(models) == {
        "model": {
            "1–5": Rate(2, 5, 5 / 4), "6–30": Rate(2, 5, 5 / 4), "after 30": Rate(1, 5, 5 / 4)
        }
    }  # fmt: skip
    assert terms(models).rates["model"]["file.trials"] == Rate(1, 2)


def test_answers_to_one_request_are_not_several_trials() -> None:
    """Draws of a request weigh as one answer, and the same answers under two attacks count once."""
    direct, drawn = Outcome("asr.direct", 0, 4, positions=(0, 0, 9, 9)), (0,) * 12 + (9,) * 4
    same = replace(direct, metric="asr.prefill.0")
    models = {
        "greedy": entry(direct),
        "drawn": entry(
            direct,
            same,
            Outcome("asr.sampling.1", 0, 16, positions=drawn, per_request=4),
            Outcome("asr.sampling.4", 0, 4),
        ),
    }
    found = first_tokens(models)
    assert found["greedy"]["all"] == found["drawn"]["prefill.0"] == Rate(2, 4)
    assert found["drawn"]["sampling.1"] == Rate(12, 16, 4)
    assert found["drawn"]["all"] == Rate(2 + 12 / 4, 4 + 16 / 4, 2)
    # Four requests were asked, however often.
    assert found["drawn"]["sampling.1"].interval == wilson_interval(3, 4)
    assert found["drawn"]["all"].interval == wilson_interval(2.5, 4)
    assert refusal_positions(models)["drawn"]["6–30"] == Rate(3, 8, 2)
    rates = terms({"a": entry(replace(direct, hits=2), replace(same, hits=2), attack(1))})
    assert rates.means == {"a": pytest.approx((2 / 4 + 1 / 4) / 2)}
    alone = entry(replace(same, positions=(0, 9)))  # nothing else has these answers
    assert first_tokens({"alone": alone})["alone"]["all"] == Rate(1, 2)


def attack(hits: int) -> Outcome:
    return Outcome("asr.completion", hits, 4)


def test_a_model_that_never_refuses_has_no_positions() -> None:
    models = {"model": attacked(10)}
    assert first_tokens(models) == {"model": {}}
    assert refusal_positions(models) == {}


def test_the_effect_of_each_term_is_measured_with_and_without_the_other() -> None:
    models = {
        "vanilla": attacked(9, 10),
        "prefix_only": attacked(7, 5),
        "rto_only": attacked(2, 1),
        "derta": attacked(1, 0),
    }
    found = terms(models)
    assert found.rates["rto_only"] == {"direct": Rate(2, 10), "completion": Rate(1, 10)}
    assert found.means == pytest.approx(
        {"vanilla": 0.95, "prefix_only": 0.6, "rto_only": 0.15, "derta": 0.05}
    )
    assert {what: round(one["completion"].share, 6) for what, one in found.differences.items()} == {
        "harmful prefix": -0.5,
        "RTO": -0.9,
        "both": -1.0,
        "harmful prefix, given RTO": -0.1,
        "RTO, given harmful prefix": -0.5,
    }
    lower, upper = found.differences["both"]["completion"].interval
    assert lower == -1 and -1 < upper < -0.5


def test_recipes_may_name_any_model_and_other_models_compare_with_the_vanilla_one() -> None:
    models = {"mine": attacked(1), "other": attacked(5), "plain": attacked(9)}
    found = terms(models, {"vanilla": "plain", "derta": "mine"})
    assert found.compared == {"both": ("plain", "mine"), "plain → other": ("plain", "other")}
    assert terms(models).compared == {
        "mine → other": ("mine", "other"),
        "mine → plain": ("mine", "plain"),
    }


def test_means_are_over_the_attacks_on_all_models() -> None:
    models = {"a": attacked(2, 4), "b": attacked(3)}
    assert (terms(models).shared, terms(models).means) == (["direct"], {})
    models["b"] = entry(Outcome("asr.completion", 0, 0, left_out=2), Outcome("asr.direct", 3, 10))
    assert terms(models).means == {}
    models["b"] = attacked(3, 7)
    assert terms(models).means == pytest.approx({"a": 0.3, "b": 0.5})


def test_over_refusal_is_reported_with_or_without_kinds() -> None:
    models = {
        "a": entry(Outcome("over_refusal", 1, 4)),
        "b": entry(Outcome("over_refusal.benign", 2, 4), Outcome("over_refusal.borderline", 3, 4)),
    }
    assert terms(models).over_refusal == {
        "a": {"": Rate(1, 4)},
        "b": {"benign": Rate(2, 4), "borderline": Rate(3, 4)},
    }


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"best": "a"}, "recipes must be among vanilla, prefix_only, rto_only, derta, got 'best'"),
        ({"derta": "b"}, r"recipes: derta must be one of \['a'\], got 'b'"),
        ({"derta": "a", "vanilla": "a"}, "recipes must name different models, got the same"),
    ],
)
def test_wrong_recipes_are_refused(recipes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        terms({"a": attacked(1)}, recipes)
