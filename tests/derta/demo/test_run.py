"""A tiny run of the whole demo: its comparison is fair and its files are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from derta.cli import demo as command
from derta.data import read_records
from derta.demo import run
from derta.demo.model import new_model, pretrain, pretraining_texts, train_tokenizer
from derta.demo.run import RATES, VARIANTS, Scale, Stage, run_demo, tuning
from derta.demo.world import (
    BORDERLINE_TUNING_WORDINGS,
    HELD_OUT_WORDINGS,
    held_out_records,
    make_world,
    tuning_records,
)

TINY = Scale(gadgets=6, hidden_size=8, base_steps=2, tuning_tokens=25_000, held_out=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("outputs") / "demo"
    return folder, run_demo(folder, [0], TINY)


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
        assert set(counts["asr"]) == attacks
        for prefilled in ("prefill", "template_prefill"):
            assert set(counts["asr"][prefilled]) == {"0", "4", "8", "16"}
        assert set(counts["over_refusal"]) == {"benign", "borderline"}
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
    world = make_world(0, TINY.gadgets)
    triples, dialogues = tuning_records(world, 0)
    assert list(read_records(folder / "data/tuning-safety.jsonl", role="safety")) == triples
    assert list(read_records(folder / "data/tuning-helpful.jsonl", role="helpful")) == dialogues
    held_out = list(read_records(folder / "data/held-out-harmful.jsonl", role="safety"))
    assert len(held_out) == TINY.held_out
    assert all(record in world.triples(HELD_OUT_WORDINGS) for record in held_out)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert tokenizer.chat_template == train_tokenizer(world).chat_template
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.config.vocab_size == len(tokenizer)


def test_an_interrupted_demo_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "report.html").write_text("of an earlier run")
    monkeypatch.setattr(run, "_evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(folder, [0], TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["demo", "report.html"]
    assert (folder / "report.html").read_text() == "of an earlier run"


def test_variants_are_tuned_on_equal_numbers_of_tokens(tmp_path: Path) -> None:
    world = make_world(0, Scale.gadgets)
    tokenizer = train_tokenizer(world)
    triples, dialogues = tuning_records(world, 0)
    stage = Stage(
        seed=0,
        scale=Scale(),
        world=world,
        tokenizer=tokenizer,
        base=new_model(tokenizer, hidden_size=8, seed=0),
        tuning=[*triples, *dialogues],
        borderline=world.borderline(BORDERLINE_TUNING_WORDINGS),
        held_out=held_out_records(world, 8, 0),
    )
    for name in VARIANTS:
        trainer, tokens = tuning(name, stage, stage.base, str(tmp_path))
        assert trainer.args.max_steps == len(tokens)
        assert 0.98 * Scale.tuning_tokens <= tokens[-1] <= Scale.tuning_tokens
        packs = trainer.train_dataset[0]
        assert sum(pack.input_ids.shape[1] for pack in packs) == tokens[0]


def test_the_base_sees_every_gadget_in_every_wording_and_no_refusal() -> None:
    world = make_world(0, 12)
    tokenizer = train_tokenizer(world)
    texts = pretraining_texts(world, tokenizer, seed=0)
    for prompt in (triple.prompt for triple in world.triples(HELD_OUT_WORDINGS)):
        assert any(prompt in text for text in texts)
    assert not any("Sorry" in text for text in texts)
    plain = [text for text in texts if not text.startswith("<|user|>")]
    assert 0.1 < len(plain) / len(texts) < 0.3


def test_base_training_lowers_the_loss_and_is_reproducible_bit_for_bit() -> None:
    world = make_world(0, 6)
    tokenizer = train_tokenizer(world)
    texts = pretraining_texts(world, tokenizer, seed=0)
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
    monkeypatch.setattr(
        command, "run_demo", lambda *args, **kwargs: asked.append((args, kwargs)) or summary
    )
    command.run(command.DemoConfig(seeds=3, output_dir=str(folder), variants=["derta"]))
    assert asked == [((folder, range(3)), {"variants": ["derta"]})]
    printed = capsys.readouterr().out
    assert "prefix_only" in printed
    assert printed.endswith(f"report: {folder}/report.html\n")
