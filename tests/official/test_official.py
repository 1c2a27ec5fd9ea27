"""The authors' code as data: what it made of invented texts, and what ours makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from derta import DertaConfig, DertaTrainer, Dialogue, Triple
from derta.data import EncodedTriple, Encoder, Rendered, pack
from derta.data.packs.packing import Drawn
from derta.data.records.rendering import official_rows
from derta.data.tokens.refusal import RefusalSet, RefusalToken
from derta.labels import derta_labels
from official.files import DIALOGUES, TRIPLES
from official.record import BLOCK_SIZE, MICRO_BATCH, RECORDING, SEED, model, tokenizer

RECORDED: dict[str, Any] = json.loads(RECORDING.read_text(encoding="utf-8"))
REFUSAL = 19_701  # their constant: "Sorry" in Llama 3's vocabulary
ROWS = [
    Rendered(prefix=row["prefix"], text=row["text"], rto=row["safe"] == "true", id=str(place))
    for place, row in enumerate(RECORDED["rows"])
]
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


def chatting() -> Any:
    """The recorded tokenizer, with the template that trainers ask for and rendered rows leave."""
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_rows_are_those_of_the_authors_generator() -> None:
    triples = [
        Triple(
            prompt=row["instruction"], harmful=row["output"], safe=row["safe_response"], id=str(at)
        )
        for at, row in enumerate(TRIPLES)
    ]
    dialogues = [
        Dialogue(
            id=f"d{at}",
            messages=[
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ],
        )
        for at, row in enumerate(DIALOGUES)
    ]
    made, files = official_rows(triples, dialogues, seed=SEED), RECORDED["files"]
    assert made["vanilla"] == files["llama_vanilla"]
    assert made["prefix_only"] == files["llama_recaug"]
    assert made["derta"] == files["llama_derta"]
    safe = made["vanilla"][len(DIALOGUES) :]
    assert made["rto_only"] == [*files["llama_derta"][: len(DIALOGUES) + len(TRIPLES)], *safe]
    doubled = [row for row in made["derta"] if row["prefix"].endswith("[\\INST] ")]
    assert doubled and all(row["text"].startswith(" Sorry") for row in doubled)
    with pytest.raises(ValueError, match="^d0: messages: expected a request and its answer, got u"):
        talk = [*dialogues[0].messages, *dialogues[1].messages]
        official_rows([], [Dialogue(id="d0", messages=talk)])


@pytest.fixture(scope="module")
def encoded() -> list[Any]:
    encoder = Encoder(
        chatting(),
        max_length=BLOCK_SIZE,
        max_tokens=10_000,
        branches=1,
        cuts="uniform",
        too_long="truncate",
    )
    return [encoder.encode(row) for row in ROWS]


def test_tokens_and_targets_are_those_of_the_authors_preprocessing(encoded: list[Any]) -> None:
    theirs = RECORDED["lora"]
    assert max(map(len, theirs["input_ids"])) == BLOCK_SIZE  # some are truncated
    for example, ids, labels in zip(encoded, theirs["input_ids"], theirs["labels"], strict=True):
        if isinstance(example, EncodedTriple):
            start = len(example.prompt)
            assert [*example.prompt, *example.harmful] == ids[:-1]
            assert labels == [-100] * start + ids[start:]
        else:
            assert example.input_ids.tolist() == ids
            assert np.where(example.is_target, example.input_ids, -100).tolist() == labels


@pytest.mark.parametrize(("script", "keep"), [("full", "official"), ("lora", 1.0)])
def test_masks_are_those_of_the_authors_model(script: str, keep: Any) -> None:
    theirs = RECORDED[script]
    torch.manual_seed(SEED)
    for first, masked in zip(range(0, len(ROWS), MICRO_BATCH), theirs["masked"], strict=True):
        width = len(masked[0])
        rows = theirs["labels"][first : first + MICRO_BATCH]
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        is_rto = torch.tensor(theirs["safe_labels"][first : first + MICRO_BATCH]).flatten() == 1
        assert derta_labels(labels, is_rto, REFUSAL, keep=keep).tolist() == masked


def drawn(example: Any, masked: list[int]) -> Drawn:
    """The example with the targets that their masked labels leave it."""
    none = np.zeros(0, np.int64)
    if not isinstance(example, EncodedTriple):
        return Drawn(example, none, none.astype(bool))
    start = len(example.prompt)
    kept = np.array(masked[start : start + len(example.harmful) + 1]) == REFUSAL
    return Drawn(example, none, kept)


@pytest.mark.parametrize("script", ["full", "lora"])
def test_a_step_of_micro_batches_has_the_authors_loss_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, encoded: list[Any]
) -> None:
    theirs = RECORDED[script]
    # Their constant is none of the few tokens of this tokenizer.
    refusals = RefusalSet((RefusalToken(REFUSAL, "Sorry", 0.0, None, None, 0.0),))
    monkeypatch.setattr("derta.training.trainer.choose_refusal_set", lambda *_: refusals)
    trainer = DertaTrainer(
        model=model(),
        args=DertaConfig(
            output_dir=str(tmp_path),
            refusal=REFUSAL,
            rto_keep="official" if script == "full" else 1.0,
            loss_norm="official",
            too_long="truncate",
            max_length=BLOCK_SIZE,
            max_tokens=MICRO_BATCH * BLOCK_SIZE,
            examples_per_step=len(ROWS),
            examples_per_pack=MICRO_BATCH,
            use_cpu=True,
        ),
        train_dataset=ROWS,
        processing_class=chatting(),
    )
    (planned, _) = trainer.train_dataset.plan.steps
    assert [len(examples) for examples in planned] == [MICRO_BATCH] * 3
    labels = [row for batch in theirs["masked"] for row in batch]
    examples = list(map(drawn, encoded, labels))
    batches = [
        pack(examples[first : first + MICRO_BATCH], trainer.objective)
        for first in range(0, len(ROWS), MICRO_BATCH)
    ]
    totals = trainer._step_totals(batches)
    with torch.no_grad():
        losses = [trainer._pack_loss(trainer.model, batch, totals).item() for batch in batches]
    # Of the three micro-batches, whose mean is the step's loss; logged in float32.
    assert losses == pytest.approx([loss / 3 for loss in theirs["losses"]], rel=1e-13)
    loss = trainer.training_step(trainer.model, batches)
    assert loss.item() == pytest.approx(sum(losses), rel=1e-6)
    for name, weight in trainer.model.named_parameters():
        assert weight.grad.norm().item() == pytest.approx(theirs["gradients"][name], rel=1e-9), name
