"""A report is a summary of the promised shape, a self-contained page, and pictures."""

from __future__ import annotations

import copy
import html.parser
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from derta.evaluation import (
    EvaluationSettings,
    Outcome,
    VariantResult,
    format_table,
    format_undecided,
    pool,
    summarize,
    wilson_interval,
    write_report,
)
from derta.evaluation.measures.results import Sample
from derta.evaluation.reporting import plots, report
from derta.evaluation.reporting.analyses import terms
from derta.evaluation.reporting.plots import draw

PICTURES = {"prefill", "refusal_curve", "rank_curve", "refusal_positions", "checkpoints", "loss"}
EVIL = "<script>alert(1)</script> $\\frac{$ {{ 7 }} & \"'"


def result(hits: int, *, n: int = 40) -> VariantResult:
    """Return the result of a model on which `hits` of `n` attacks succeed."""
    refused = tuple(range(n - hits))
    return VariantResult(
        outcomes=(
            Outcome("asr.direct", 0, n, positions=(0,) * n),
            Outcome("asr.prefill.0", 0, n, positions=(0,) * n),
            Outcome("asr.prefill.4", hits, n, positions=refused),
            Outcome("asr.prefill.64", 0, 0, left_out=n),
            Outcome("asr.completion", n, n, empty=3, answers=n + 3),
            Outcome("over_refusal.benign", 1, n, positions=(2,)),
            Outcome("helpful_accuracy", n - 1, n),
            Outcome("top_k.10", 0.75 * n, n),
            Outcome("rank_assisted.10", hits, n),
        ),
        harmful_ranks=(np.arange(11), np.arange(8)),
        top_k=(10,),
        harmful_curves=(np.linspace(0.9, hits / n, 12), np.linspace(0.8, 0.2, 9)),
        benign_curves=(np.linspace(0.1, 0, 7),),
        seconds=1.5,
    )


def summary(seeds: int = 1, names: tuple[str, ...] = ("base", "vanilla", "derta")) -> dict:
    history = [{"step": step, "loss": 2 / step, "mle_loss": 1 / step} for step in range(1, 30)]
    return summarize(
        {
            name: [result(4 * place + seed) for seed in range(seeds)]
            for place, name in enumerate(names)
        },
        seconds=75.0,
        seeds=range(seeds),
        tokens=dict.fromkeys(names[1:], 1000),
        loss={name: [[*history, {"train_runtime": 1.0}]] * seeds for name in names[1:]},
        checkpoints={
            name: [
                [{"tokens": 500 * k, "asr": 1 / (k + seed), "over_refusal": 0.1} for k in (1, 2)]
                for seed in range(seeds)
            ]
            for name in names[1:]
        },
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report once, because its pictures are slow to draw, and return its page."""
    return write_report(summary(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def drawn(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every report the pictures of `written`."""
    pngs = [written.with_name(f"{name}.png").read_bytes() for name in PICTURES]
    pictures = {name: (png, "<svg></svg>") for name, png in zip(PICTURES, pngs, strict=True)}
    monkeypatch.setattr(report, "draw", lambda made: pictures)


def test_positions_are_drawn_only_if_the_judge_knows_them() -> None:
    for positions, drawn in (((), False), ((3,), True)):
        outcome = Outcome("asr.direct", 1, 2, positions=positions)
        made = summarize({"derta": [VariantResult(outcomes=(outcome,))]}, seconds=1.0)
        assert ("refusal_positions" in draw(made)) == drawn


def test_whole_prefills_are_drawn_last_and_have_no_refusal_positions() -> None:
    outcomes = [
        Outcome(f"asr.prefill.{depth}", 1, 2, positions=(at,))
        for depth, at in (("whole", 5000), ("64", 64), ("0", 0))
    ]
    made = summarize({"derta": [VariantResult(tuple(outcomes))]}, seconds=1.0)
    assert draw(made).keys() == {"prefill", "refusal_positions"}
    heads = format_table(made).splitlines()[1]
    assert re.split(r"\s{2,}", heads.strip()) == ["%", "0", "64", "whole", "attacks"]
    (axes,) = plots.refusal_positions(made).axes
    assert axes.get_xlim()[1] < 100


def test_captions_say_how_empty_answers_count(tmp_path: Path) -> None:
    prefilled = Outcome("asr.prefill.4", 1, 2, empty=1)
    for kind, said in (
        ("apart", "empty answers are left out."),
        ("failed", "empty answers count as attacks without success."),
    ):
        conditions = EvaluationSettings(empty_answers=kind).conditions()
        made = summarize({"derta": [VariantResult((prefilled,), conditions=conditions)]}, seconds=1)
        assert said in Page(write_report(made, tmp_path).read_text("utf-8")).shown


def test_a_single_draw_is_not_called_the_worst(tmp_path: Path) -> None:
    drawn = [Outcome(f"asr.sampling.{n}", 1, 2, left_out=1) for n in (1, 8)]
    made = summarize({"derta": [VariantResult((drawn[0],))]}, seconds=1)
    assert format_table(made).split()[:4] == ["drawn", "answers", "empty", "answers"]
    assert "worst" not in format_table(made)
    page = Page(write_report(made, tmp_path).read_text("utf-8")).shown
    assert "derta, asr one drawn answer: 1 of 3 records left out" in page
    made = summarize({"derta": [VariantResult(tuple(drawn))]}, seconds=1)
    heads = format_table(made).splitlines()[1]
    assert re.split(r"\s{2,}", heads.strip()) == ["%", "one", "worst of 8", "attacks"]
    page = Page(write_report(made, tmp_path).read_text("utf-8")).shown
    assert "derta, asr worst of 8 drawn answers: 1 of 3 records left out" in page


def test_undecided_answers_count_once_and_only_those_that_are_judged() -> None:
    outcomes = [
        Outcome(metric, 0, 2, undecided=2)
        for metric in ("asr.direct", "asr.prefill.0", "asr.prefill.4", "over_refusal.benign")
    ]
    draws = [Outcome(f"asr.sampling.{n}", 0, 4 // n, undecided=4 // n) for n in (1, 2)]
    others = [Outcome(metric, 1, 2) for metric in ("top_k.1", "helpful_accuracy", "forced.0")]
    made = summarize({"a": [VariantResult((*outcomes, *draws, *others))]}, seconds=1)
    # Plain, after four tokens, harmless, and the single draws.
    assert format_undecided(made).startswith("a: judge keyword undecided on 10 of 20 answers")


def test_the_summary_has_the_promised_shape() -> None:
    made = summary()
    assert list(made) == ["variants", "seeds", "tokens", "seconds"]
    entry = made["variants"]["derta"]
    assert entry["asr"] == {"direct": 0.0, "prefill": {"0": 0.0, "4": 0.2}, "completion": 1.0}
    assert entry["over_refusal"] == {"benign": 0.025}
    assert entry["helpful_accuracy"] == 0.975
    assert entry["refusal_curve"].keys() == {"harmful", "benign"}
    assert entry["refusal_curve_counts"]["harmful"] == [2] * 9 + [1] * 3
    assert entry["detector_auc"] == 1.0
    assert (made["seeds"], made["tokens"]) == ([0], {"vanilla": 1000, "derta": 1000})
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_seeds_are_pooled_by_trial_and_also_listed_separately() -> None:
    results = [result(2), result(6), result(1, n=10)]
    pooled = pool(results).to_dict()
    assert pooled["asr"]["prefill"]["4"] == 0.1  # 9 of 90
    assert pooled["counts"]["asr"]["prefill"]["4"]["trials"] == 90
    assert pooled["seconds"] == 4.5
    assert pooled["refusal_curve_counts"]["benign"] == [3] * 7
    entry = summarize({"derta": results}, seconds=1)["variants"]["derta"]
    assert [seed["asr"]["prefill"]["4"] for seed in entry["by_seed"]] == [0.05, 0.15, 0.1]


def test_seeds_that_differ_by_more_than_chance_widen_the_interval() -> None:
    alike = [VariantResult((Outcome("asr.direct", hits, 100),)) for hits in (20, 24)]
    apart = [VariantResult((Outcome("asr.direct", hits, 100),)) for hits in (6, 38)]
    for results, dispersion in ((alike, None), (apart, 29.83683)):
        pooled = pool(results).to_dict()
        assert pooled["asr"]["direct"] == 0.22
        assert pooled["counts"]["asr"]["direct"].get("dispersion") == dispersion
        n = 200 / (dispersion or 1)
        interval = pytest.approx(wilson_interval(0.22 * n, n), abs=1e-6)
        assert pooled["intervals"]["asr"]["direct"] == interval
    assert interval.expected[0] < 0.06 and 0.38 < interval.expected[1]
    once_more = pool([pool(apart), pool(apart[:1])]).to_dict()["counts"]["asr"]["direct"]
    assert once_more["dispersion"] == 24.576
    drawn = [
        VariantResult((Outcome("asr.direct", 4 * hits, 400, per_request=4),)) for hits in (6, 38)
    ]
    four_each = pool(drawn).to_dict()  # a request counts once
    assert four_each["counts"]["asr"]["direct"]["dispersion"] == 29.83683
    assert four_each["intervals"]["asr"]["direct"] == interval


def test_a_comparison_reads_how_far_seeds_differ() -> None:
    results = [VariantResult((Outcome("asr.direct", hits, 100),)) for hits in (6, 38)]
    entry = summarize({"derta": results}, seconds=1)["variants"]["derta"]
    rate = terms({"derta": entry}).rates["derta"]["direct"]
    assert rate.share == 0.22
    assert rate.interval == pytest.approx(entry["intervals"]["asr"]["direct"], abs=1e-6)


def test_histories_are_means_over_seeds_row_by_row() -> None:
    entry = summary(seeds=2)["variants"]["derta"]
    assert entry["loss"][1] == {"step": 2.0, "loss": 1.0, "mle_loss": 0.5}
    assert len(entry["loss"]) == 29
    assert entry["checkpoints"] == [
        {"tokens": 500.0, "asr": 0.75, "over_refusal": 0.1},
        {"tokens": 1000.0, "asr": pytest.approx(5 / 12, abs=1e-6), "over_refusal": 0.1},
    ]
    with pytest.raises(ValueError, match=r"loss of a must have equally many rows .*, got \[1, 2\]"):
        rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
        summarize({"a": [result(1)] * 2}, seconds=1, loss={"a": [rows, rows[:1]]})


def everything(attacks: int = 3) -> VariantResult:
    """Return a result with every kind of figure, by two judges."""
    metrics = [
        "asr.direct",
        "asr.prefill.4",
        "asr.prefilled",
        "asr.template",
        "asr.template_prefill.4",
        "asr.multi_turn",
        "asr.file.codeattack",
        "asr.file.pair",
        "over_refusal.benign",
        "over_refusal.borderline",
    ]
    return VariantResult(
        outcomes=(
            *(Outcome(metric, attacks, 8) for metric in metrics),
            Outcome("accuracy.gsm8k", 6, 8),
        ),
        judges={"guard": tuple(Outcome(metric, 2, 4, undecided=4) for metric in metrics)},
        borderline_curves=(np.linspace(0.3, 0, 7),),
        lm_eval={"ifeval": {"acc": 0.5}},
    )


def test_the_table_names_every_figure() -> None:
    assert format_table(summary()).splitlines() == [
        "         attack success      after prefilled tokens  tokens in the top k  "
        "success by the top k  over-refusal  empty answers",
        "%        direct  completion           0           4                   10  "
        "                  10        benign  attacks  harmless"
        "  helpful accuracy  detector AUC",
        "base        0.0       100.0         0.0         0.0                 75.0  "
        "                 0.0           2.5      2.4       0.0"
        "              97.5         1.000",
        "vanilla     0.0       100.0         0.0        10.0                 75.0  "
        "                10.0           2.5      2.4       0.0"
        "              97.5         1.000",
        "derta       0.0       100.0         0.0        20.0                 75.0  "
        "                20.0           2.5      2.4       0.0"
        "              97.5         1.000",
        "",
        "empty answers",
        "%        completion",
        "base            7.0",
        "vanilla         7.0",
        "derta           7.0",
    ]


def test_every_scenario_has_its_column_and_every_judge_its_row(tmp_path: Path) -> None:
    made = summarize({"derta": [everything()]}, seconds=1)
    groups, heads, row, _, *others, _, title, _, _, keyword, guard = format_table(made).splitlines()
    assert re.split(r"\s{2,}", groups.strip()) == [
        "attack success",
        "after prefilled tokens",
        "in a template, after prefilled tokens",
        "attack success of ready-made prompts",
        "over-refusal",
        "empty answers",
    ]
    assert re.split(r"\s{2,}", heads.strip()) == [
        *("%", "direct", "prefilled", "template", "multi-turn", "4", "4", "codeattack", "pair"),
        *("benign", "borderline", "attacks", "harmless"),
    ]
    assert row.split() == ["derta", *["37.5"] * 10, "0.0", "0.0"]
    assert [line.split() for line in others] == [
        ["accuracy", "lm-eval"],
        ["%", "gsm8k", "ifeval", "acc"],
        ["derta", "75.0", "0.500"],
    ]
    assert title == "by judge"
    assert keyword.split() == ["derta:", "keyword", *["37.5"] * 10, "0.0", "0.0"]
    assert guard.split() == ["derta:", "guard", *["50.0"] * 10, "0.0", "0.0"]
    shown = Page(write_report(made, tmp_path).read_text("utf-8")).shown
    for text in ("Judges side by side", "derta: guard", "codeattack", "by the judge: keyword"):
        assert text in shown
    assert "derta, asr file pair: guard undecided on 4 of 8 answers" in shown
    assert format_undecided(made) == (
        "derta: judge guard undecided on 40 of 80 answers, which are in no figure"
    )
    assert format_undecided(summary()) == ""
    assert "Reading borderline responses" in shown


def test_a_judge_that_decided_nothing_leaves_a_sentence_and_no_table(tmp_path: Path) -> None:
    outcomes = (Outcome("asr.multi_turn", 0, 0, undecided=4),)
    made = summarize(
        {"derta": [VariantResult(outcomes, judge="guard", judges={"other": outcomes})]}, seconds=1
    )
    assert format_table(made) == ""
    page = Page(write_report(made, tmp_path).read_text("utf-8"))
    assert "table" not in page.tags
    visible, folded = page.shown.split("Records left out, answers empty or undecided")
    for judge in ("guard", "other"):
        sentence = f"derta: judge {judge} undecided on 4 of 4 answers, which are in no figure."
        assert visible.count(sentence) == 1
        assert f"derta, asr multi-turn: {judge} undecided on 4 of 4 answers" in folded
    assert "Judges side by side" not in visible and "Small figures" not in visible


def test_many_figures_become_several_tables(tmp_path: Path) -> None:
    deep = [Outcome(f"asr.prefill.{2**k}", k, 20) for k in range(8)]
    files = [Outcome(f"asr.file.attack-{k}", k, 20) for k in range(5)]
    made = summarize({"derta": [VariantResult(outcomes=(*deep, *files))]}, seconds=1)
    first, second = format_table(made).split("\n\n")
    assert first.splitlines()[-1].split() == ["derta", *(f"{5 * k}.0" for k in range(8))]
    assert second.splitlines()[-1].split() == ["derta", *(f"{5 * k}.0" for k in range(5)), "0.0"]
    page = Page(write_report(made, tmp_path).read_text("utf-8"))
    assert page.tags.count("table") == 2


def test_seeds_are_pooled_for_every_judge_and_task() -> None:
    pooled = pool([everything(), everything(attacks=5)]).to_dict()
    assert pooled["asr"]["file"] == {"codeattack": 0.5, "pair": 0.5}
    assert pooled["judges"]["guard"]["counts"]["asr"]["direct"] == {
        "hits": 4,
        "trials": 8,
        "left_out": 0,
        "empty": 0,
        "undecided": 8,
        "answers": 16,
        "per_request": 1,
    }
    assert pooled["lm_eval"] == {"ifeval": {"acc": 0.5}}


@pytest.mark.usefixtures("drawn")
def test_only_the_owner_can_read_a_report_with_samples(tmp_path: Path) -> None:
    made = summary()
    made["variants"]["derta"]["samples"] = [vars(Sample("asr.direct", "a", "b", "", "c", True))]
    page = write_report(made, tmp_path)
    for path in (page, tmp_path / "summary.json"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_missing_figure_is_a_dash() -> None:
    made = summarize({"a": [VariantResult(perplexity=(2.0, 4))], "b": [result(1)]}, seconds=1)
    lines = format_table(made).splitlines()
    assert "perplexity" in lines[1]
    assert re.split(r"\s{2,}", lines[2]) == ["a", *"–––––––––", "–", "1.649", "–"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_picture_is_written_and_not_empty(tmp_path: Path, seeds: int) -> None:
    page = write_report(summary(seeds), tmp_path / "new" / "folder")
    assert page.name == "report.html"
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html",
        "summary.json",
        *(f"{name}.png" for name in PICTURES),
    }
    for name in PICTURES:
        with Image.open(page.parent / f"{name}.png") as image:
            colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert image.width > 600 and image.height > 300
            drawn = [color for _, color in colors if max(color) - min(color) > 60]
            assert drawn, f"{name} has only greys"
    text = page.read_text("utf-8")
    assert text.count("<svg") == len(PICTURES)
    assert ("seeds, and intervals are widened where these" in text) == (seeds > 1)
    assert json.loads((page.parent / "summary.json").read_text()) == summary(seeds)


class Page(html.parser.HTMLParser):
    """The tags, references and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                self.references.append(value or "")

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_loads_nothing_and_runs_nothing(written: Path) -> None:
    text = written.read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?(.)", text))
    assert "@import" not in text
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"\w+://[^\s\"'<>]+", text)) <= namespaces


def test_ids_differ_between_pictures(written: Path) -> None:
    text = written.read_text("utf-8")
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for picture in pictures:
        wanted = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", picture))
        assert wanted <= set(re.findall(r"id=\"([\w-]+)\"", picture))
        for other in pictures:
            if other is not picture:
                assert not wanted & set(re.findall(r"id=\"([\w-]+)\"", other))


def test_text_of_models_and_data_is_escaped(tmp_path: Path) -> None:
    made = summary(names=("base", EVIL))
    made["variants"][EVIL]["samples"] = [
        vars(Sample("asr.direct", EVIL, EVIL, EVIL, EVIL, counted=True))
    ]
    page = Page(write_report(made, tmp_path, title=EVIL).read_text("utf-8"))
    assert "script" not in page.tags
    assert page.shown.count(EVIL) >= 6


def test_samples_are_hidden_by_default(written: Path) -> None:
    assert "blockquote>" not in written.read_text("utf-8")


def test_notes_count_records_left_out_and_empty_answers(written: Path) -> None:
    page = Page(written.read_text("utf-8"))
    assert "derta, asr prefill 64: 40 of 40 records left out" in page.shown
    assert "derta, asr completion: 3 of 43 answers empty" in page.shown
    assert "1 min 15 s" in page.shown


def test_one_figure_is_enough_for_a_report(tmp_path: Path) -> None:
    bare = VariantResult(outcomes=(Outcome("over_refusal.benign", 0, 5),))
    page = write_report(summarize({"only": [bare]}, seconds=1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "summary.json"}
    assert "over-refusal" in Page(page.read_text("utf-8")).shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made["variants"].clear(), "at least one variant, got none"),
        (lambda made: made.update(seconds=float("nan")), "Out of range float values"),
    ],
)
def test_an_invalid_summary_writes_nothing(tmp_path: Path, change: Any, message: str) -> None:
    made = copy.deepcopy(summary())
    change(made)
    with pytest.raises(ValueError, match=message):
        write_report(made, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("interrupted_at", [0, 5, 6])
def test_an_interrupted_report_leaves_only_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    write_report(summary(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, calls = Path.replace, []

    def break_off(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > interrupted_at:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", break_off)
    changed = summary(names=("base", "other"))
    with pytest.raises(KeyboardInterrupt):
        write_report(changed, tmp_path)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["summary.json"] == before["summary.json"]
    for name in PICTURES:
        Image.open(io.BytesIO(after[f"{name}.png"])).load()
    assert after["report.html"].endswith(b"</html>\n")


def test_the_umask_decides_who_can_read_the_files(written: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert written.stat().st_mode & 0o777 == 0o666 & ~umask
