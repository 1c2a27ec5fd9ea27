"""A comparison has the same figures as text, as a page and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from derta.evaluation import (
    Defence,
    EvaluationSettings,
    Outcome,
    VariantResult,
    compare,
    format_comparison,
    wilson_interval,
    write_comparison,
)
from derta.evaluation.reporting.analyses import Rate

EVIL = "<script>alert(1)</script> $\\frac{$ {{ 7 }} & \"'"


def models(*names: str) -> dict[str, dict[str, Any]]:
    """Return entries, each with ten more refusals of forty attacks than the one before."""
    return {
        name: VariantResult(
            outcomes=(
                Outcome("asr.direct", 30 - 10 * nth, 40, positions=(0,) * (10 + 10 * nth)),
                Outcome("asr.file.rhyme", 40 - 10 * nth, 40, positions=(7, 40) * 5 * nth),
                Outcome("over_refusal.benign", nth, 40, positions=(0,) * nth),
            )
        ).to_dict()
        for nth, name in enumerate(names)
    }


def test_the_tables_name_every_figure() -> None:
    made = models("vanilla", "derta")
    made["derta"]["position_unit"] = "words"
    assert format_comparison(compare(made)).splitlines() == [
        "Refusals that start at once",
        "%        direct  rhyme    all  refusals  counted in",
        "vanilla   100.0      –  100.0        10      tokens",
        "derta     100.0    0.0   66.7        30       words",
        "",
        "Where refusals start",
        "%          1–5  6–30  after 30  refusals  counted in",
        "vanilla  100.0   0.0       0.0        10      tokens",
        "derta     66.7  16.7      16.7        30       words",
        "",
        "Attack success",
        "%        direct  rhyme  mean",
        "vanilla    75.0  100.0  87.5",
        "derta      50.0   75.0  62.5",
        "",
        "What changes attack success",
        "points                            direct               rhyme   mean",
        "both: vanilla → derta  -25.0 [-43 to -4]  -25.0 [-40 to -11]  -25.0",
        "",
        "Over-refusal",
        "%        benign",
        "vanilla     0.0",
        "derta       2.5",
    ]


def test_an_attack_has_the_same_heading_as_in_the_report() -> None:
    entry = VariantResult((Outcome("asr.multi_turn", 1, 4, positions=(0,)),)).to_dict()
    table = format_comparison(compare({"derta": entry}, analyses=["first_tokens"]))
    assert "multi-turn" in table.splitlines()[1]


def test_a_note_warns_of_rates_by_different_judges() -> None:
    made = models("vanilla", "derta")
    assert compare(made)["notes"] == []
    made["derta"]["judge"] = "guard"
    (note,) = compare(made)["notes"]
    assert note.endswith("not comparable: vanilla by keyword, derta by guard")


def test_a_note_warns_of_rates_under_different_conditions() -> None:
    made = models("vanilla", "derta", "other")
    made["vanilla"]["conditions"] = {"max_new_tokens": 64, "refusal_banned": 8}
    made["derta"]["conditions"] = {"max_new_tokens": 64, "refusal_banned": 16}
    expected = "refusal_banned differs, and rates depend on it: vanilla 8, derta 16"
    assert compare(made)["notes"] == [expected]


def test_a_note_warns_of_rates_under_different_defences() -> None:
    made = models("vanilla", "defended", "instructed", "unknown")
    words = "Refuse what the guild does not allow, as long as it has not changed its mind."
    for name, defence in (
        ("vanilla", None),
        ("defended", Defence(reinsert_header=True, header_after=8)),
        ("instructed", Defence(system_prompt=words)),
    ):
        made[name]["conditions"] = EvaluationSettings(defence=defence).conditions()
    prompt, header = compare(made)["notes"]
    said = "differs, and rates depend on it: vanilla none,"
    short = "Refuse what the guild does not allow, as long as it has ..."
    assert prompt == f"system_prompt {said} defended none, instructed {short!r}"
    assert header == f"header_after {said} defended 8, instructed none"


def test_empty_answers_and_repeated_draws_are_told() -> None:
    """Attacks that write the start, or forbid refusals there, count no refusals at the start."""
    outcomes = (
        Outcome("asr.direct", 7, 10, positions=(0, 1, 9)),
        Outcome("asr.refusal_banned.0", 5, 10, empty=10, positions=(8,) * 5, answers=20),
        Outcome("asr.refusal_banned.4", 5, 10, positions=(4,) * 5),
        Outcome("asr.prefill_thinking.4", 5, 10, positions=(4,) * 5),
        Outcome("asr.sampling.1", 20, 40, per_request=4),
        Outcome("over_refusal.benign", 0, 10),
    )
    made = compare({"derta": VariantResult(outcomes).to_dict()})
    found = made["first_tokens"]["derta"]
    assert found.keys() == {"direct", "all"} and found["all"] == Rate(2, 3)
    assert "one drawn answer" in format_comparison(made).splitlines()[9]
    rates = made["terms"]["rates"]["derta"]
    assert rates["sampling.1"].interval == rates["refusal_banned.4"].interval
    text = format_comparison(made)
    assert text.splitlines()[-3:] == [
        "Empty answers",
        "%      refusal banned 0",
        "derta              50.0",
    ]
    assert "Empty answers" not in format_comparison(compare(models("vanilla", "derta")))


def test_many_attacks_become_several_tables(tmp_path: Path) -> None:
    attacks = [Outcome(f"asr.file.a{nth:02}", nth, 40) for nth in range(14)]
    comparison = compare({"a": VariantResult(outcomes=attacks).to_dict()}, analyses=["terms"])
    title, heads, row, *others = format_comparison(comparison).splitlines()
    assert (title, heads.split()) == ("Attack success", ["%", *(f"a{nth:02}" for nth in range(12))])
    assert row.split() == ["a", *(f"{2.5 * nth:.1f}" for nth in range(12))]
    assert others == ["", "%   a12   a13  mean", "a  30.0  32.5  16.2"]
    text = write_comparison(comparison, tmp_path).read_text("utf-8")
    assert (text.count("<table"), text.count("<h2>")) == (2, 1)


def test_tokens_within_reach_and_the_attacks_on_them_are_two_tables() -> None:
    outcomes = [
        Outcome(metric, hits, 40)
        for metric, hits in (("top_k.5", 10.5), ("top_k.10", 22.0), ("rank_assisted.5", 1))
    ]
    made = compare({"a": VariantResult(tuple(outcomes)).to_dict(), **models("b")})
    assert format_comparison(made).endswith(
        "Harmful tokens within reach\n%  top 5  top 10\na   26.2    55.0\nb      –       –\n\n"
        "Attack success by the top k\n%  top 5\na    2.5\nb      –"
    )
    low, high = made["reach"]["tokens"]["a"]["10"].interval
    assert 0.3 < low < 0.55 < high < 0.8


def test_only_the_requested_analysis_is_shown(tmp_path: Path) -> None:
    made = compare(models("a", "b"), analyses=["positions"], notes=["one row is missing"])
    assert format_comparison(made).splitlines()[0] == "Where refusals start"
    text = write_comparison(made, tmp_path).read_text("utf-8")
    assert (text.count("<table"), text.count("<svg")) == (1, 1)
    assert "one row is missing" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.html",
        "comparison.json",
        "positions.png",
    }


def test_the_files_hold_the_figures(tmp_path: Path) -> None:
    page = write_comparison(compare(models("vanilla", "derta")), tmp_path / "new")
    found = json.loads((page.parent / "comparison.json").read_text("utf-8"))
    assert list(found) == ["models", "notes", "first_tokens", "positions", "terms", "reach"]
    assert found["models"] == models("vanilla", "derta")
    assert found["first_tokens"]["derta"]["all"] == {
        "share": pytest.approx(2 / 3),
        "interval": pytest.approx(wilson_interval(20 / 1.5, 20), abs=1e-4),
        "hits": 20,
        "trials": 30,
        "per_request": 1.5,
    }
    assert found["terms"]["means"] == {"vanilla": 0.875, "derta": 0.625}
    assert found["terms"]["differences"]["both"]["direct"]["share"] == -0.25
    for name in ("positions", "attacks"):
        with Image.open(page.parent / f"{name}.png") as image:
            assert image.width > 600


def test_models_with_long_names_are_compared_by_their_full_names(tmp_path: Path) -> None:
    names = [f"a model with quite a long name, number {nth}" for nth in range(4)]
    text = write_comparison(compare(models(*names)), tmp_path).read_text("utf-8")
    assert all(f"{names[0]} → {name}" in text for name in names[1:])


def test_text_of_models_is_escaped(tmp_path: Path) -> None:
    made = compare(models("a", EVIL), notes=[EVIL])
    text = write_comparison(made, tmp_path, title=EVIL).read_text("utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


def test_a_model_without_shared_figures_has_only_dashes(tmp_path: Path) -> None:
    made = compare({"a": VariantResult(perplexity=(2.0, 4)).to_dict(), **models("b")})
    assert re.search(r"^a → b +– +–$", format_comparison(made), re.MULTILINE)
    assert write_comparison(made, tmp_path).is_file()
    bare = compare({"a": VariantResult(perplexity=(2.0, 4)).to_dict()})
    write_comparison(bare, tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "models must hold at least one model, got none"),
        (
            {"analyses": ["position"]},
            r"analyses must be among first_tokens, positions, terms, reach, got \['position'\]",
        ),
    ],
)
def test_impossible_comparisons_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**({"models": models("a")} | arguments))
