"""A tiny run of the whole demo: its comparison is fair and its files are complete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from derta.cli import demo as command
from derta.data import read_records
from derta.demo import run
from derta.demo.gadgets import (
    Gadgets,
    held_out_records,
    make_guild,
    pretraining_texts,
    tuning_records,
    vocabulary,
)
from derta.demo.model import new_model, pretrain, train_tokenizer
from derta.demo.run import RATES, VARIANTS, run_demo, tuning
from derta.demo.world import Stage

TINY = Gadgets(
    gadgets=12, hidden_size=8, base_steps=2, triples=40, tuning_tokens=22_000, held_out=4
)

SHORT = replace(TINY, tuning_tokens=4_000, held_out=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("outputs") / "demo"
    return folder, run_demo(TINY, folder, [0])


def test_the_summary_has_its_fixed_structure(written: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = written
    assert json.loads((folder / "summary.json").read_text()) == summary
    tuned = ["vanilla", "prefix_only", "rto_only", "derta", "derta_balanced"]
    assert list(summary["variants"]) == ["base", *tuned]
    assert summary["seeds"] == [0]
    assert list(summary["tokens"]) == list(VARIANTS)
    assert summary["seconds"] > 0
    for entry in summary["variants"].values():
        counts = entry["counts"]  # a model of two steps may answer nothing, which has no rate
        attacks = {"direct", "prefill", "completion", "template", "template_prefill"}
        attacks |= {"refusal_banned", "sampling", "in_context"}
        assert set(counts["asr"]) == attacks
        for prefilled in ("prefill", "template_prefill", "refusal_banned"):
            assert set(counts["asr"][prefilled]) == {"0", "4", "16"}
        assert set(counts["over_refusal"]) == {"benign", "borderline"}
        assert set(entry["empty"]) == {"asr", "over_refusal"}
        assert "helpful_accuracy" in entry
        assert set(entry["refusal_curve"]) == {"harmful", "benign", "borderline"}


def test_every_tuning_is_evaluated_at_four_checkpoints(
    written: tuple[Path, dict[str, Any]],
) -> None:
    _, summary = written
    for name in VARIANTS:
        rows = summary["variants"][name]["checkpoints"]
        tokens = [row["tokens"] for row in rows]
        assert tokens == sorted(set(tokens)) and len(tokens) == 4
        assert tokens[-1] == summary["tokens"][name]
        assert all(0 <= row[rate] <= 1 for row in rows for rate in RATES)


def test_the_report_has_its_pictures(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    assert "<svg" in (folder / "report.html").read_text()
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures >= {"prefill", "refusal_curve", "refusal_positions", "checkpoints", "loss"}


def test_the_demo_leaves_a_base_model_and_records_for_other_runs(
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = written
    guild = make_guild(0, TINY.gadgets)
    triples, dialogues, borderline = tuning_records(guild, TINY.triples, 0)
    held_out = held_out_records(guild, TINY.held_out, 0)
    for name, role, records in (
        ("tuning-safety", "safety", triples),
        ("tuning-helpful", "helpful", dialogues),
        ("held-out-harmful", "safety", held_out.harmful),
        ("held-out-helpful", "helpful", held_out.helpful),
    ):
        assert list(read_records(folder / f"data/{name}.jsonl", role=role)) == records
    assert len((folder / "data/tuning-borderline.jsonl").read_text().splitlines()) == len(
        borderline
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert tokenizer.chat_template == train_tokenizer(vocabulary(guild)).chat_template
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.config.vocab_size == len(tokenizer)


def test_a_killed_demo_changes_no_report_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "report.html").write_text("of an earlier run")
    # The first defends the last, which is tuned once; curves are of the variant's own tokens.
    names = ["vanilla_header", "derta_refusal_tokens", "vanilla", "red_flag"]
    tuned = []

    def interrupted(self: Any, name: str) -> Any:
        tuned.append(name)
        if name == "derta_refusal_tokens" and tuned.count(name) == 1:
            raise KeyboardInterrupt
        return tune(self, name)

    tune = run._SeedRun._tune
    monkeypatch.setattr(run._SeedRun, "_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(SHORT, folder, [0], names)
    assert {path.name for path in folder.iterdir()} == {"report.html", "base", "data", "parts"}
    assert (folder / "report.html").read_text() == "of an earlier run"
    summary = run_demo(SHORT, folder, [0], names)
    others = ["derta_refusal_tokens", "derta_refusal_tokens", "red_flag"]
    assert tuned == ["base", "vanilla", *others]
    assert list(summary["variants"]) == ["base", *names]
    assert summary["tokens"]["vanilla_header"] == summary["tokens"]["vanilla"]
    assert "refusal_curve" not in summary["variants"]["vanilla_header"]
    assert run_demo(SHORT, folder, [0], names) == summary
    assert len(tuned) == 5


def test_variants_are_tuned_on_equal_numbers_of_tokens(tmp_path: Path) -> None:
    world = Gadgets()
    guild = make_guild(0, world.gadgets)
    tokenizer = train_tokenizer(vocabulary(guild))
    triples, dialogues, borderline = tuning_records(guild, world.triples, 0)
    stage = Stage(
        tokenizer=tokenizer,
        base=new_model(tokenizer, hidden_size=8, seed=0),
        tuning=[*triples, *dialogues],
        borderline=borderline,
        held_out=held_out_records(guild, 8, 0),
    )
    for name in VARIANTS:
        trainer, tokens = tuning(name, world, 0, stage, stage.base, str(tmp_path))
        assert trainer.args.max_steps == len(tokens)
        assert 0.97 * world.tuning_tokens <= tokens[-1] <= world.tuning_tokens
        packs = trainer.train_dataset[0]
        assert sum(pack.input_ids.shape[1] for pack in packs) == tokens[0]


def test_base_training_lowers_the_loss_and_is_reproducible_bit_for_bit() -> None:
    guild = make_guild(0, 6)
    tokenizer = train_tokenizer(vocabulary(guild))
    texts = pretraining_texts(guild, tokenizer, seed=0)
    losses = []
    for steps in (1, 20, 20):
        model = new_model(tokenizer, hidden_size=16, seed=0)
        pretrain(model, tokenizer, texts, steps=steps, seed=0, title="base")
        input_ids = torch.tensor([tokenizer(texts[0])["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=input_ids, labels=input_ids).loss.item())
    assert losses[1] == losses[2] < losses[0]


def test_a_demo_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        command.DemoConfig(seeds=0)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variants must be of vanilla, .*, got 'nothing'"):
        command.DemoConfig(variants=["nothing"])


def test_the_command_prints_the_table_and_the_reports_path(
    written: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, summary = written
    asked = []
    monkeypatch.setattr(command, "run_demo", lambda *args: asked.append(args) or summary)
    variants = ["derta", "vanilla_header", "system_prompt"]
    command.run(command.DemoConfig(seeds=3, output_dir=str(folder), variants=variants))
    assert asked == [(Gadgets(), folder, range(3), variants)]
    printed = capsys.readouterr().out
    assert printed.startswith("one base model and 2 tunings of it, by")  # a defended one is vanilla
    assert "prefix_only" in printed
    report, _, better = printed.partition(f"report: {folder}/report.html\n")
    assert report and "derta demo --world cooking" in better and "93 MB" in better
