"""Preference losses are those of their equations, in one pass and without logits."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F

from derta import DertaConfig, DertaTrainer
from derta.data import (
    Collator,
    EncodedTriple,
    Encoder,
    draw_cuts,
    example_rng,
    pack,
    packed_length,
    render_pack,
)
from derta.data.packs.references import References, pair_keys
from derta.objectives.preference import PreferenceObjective, _Rows
from derta.training.reference import FOLDER, read_references, reference_file, write_references
from derta_kernels.head_loss import Head
from runs import RECORDS, poison, trainer
from tiny import tiny_model, tiny_tokenizer

# Numbers of each loss that are not its defaults.
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": dict(preference_beta=0.3, preference_weight=0.7),
    "simpo": dict(preference_beta=1.5, preference_weight=0.7, simpo_gamma=0.4),
    "orpo": dict(preference_weight=0.7),
}
VARIANTS = {"whole": {}, "prefixed": {"cuts": "uniform"}}


def of_pairs(
    directory: Path, loss: str, model: Any = None, records: Any = RECORDS, **changes: Any
) -> DertaTrainer:
    numbers = LOSSES[loss] | {"preference": loss, "branches": 1, "max_length": 200}
    return trainer(directory, model, records, **{**numbers, **changes})


def sequences(
    run: DertaTrainer, epoch: int = 0
) -> Iterator[tuple[Tensor, Tensor, int, int, EncodedTriple]]:
    """Each pair as other trainers run it: both sequences, where responses start, and the cut."""
    for one in run.train_dataset.examples:
        if isinstance(one, EncodedTriple):
            rng = example_rng(run.args.seed, epoch, one.id)
            (cut,) = draw_cuts(one, policy=run.args.cuts, branches=1, rng=rng).tolist()
            before = [*one.prompt, *one.harmful[:cut]]
            chosen, rejected = ([*before, *rest] for rest in (one.safe, one.harmful[cut:]))
            yield torch.tensor([chosen]), torch.tensor([rejected]), len(before), cut, one


def log_p(model: Any, ids: Tensor, start: int) -> Tensor:
    """The log probability of each token from `start` on."""
    logits = model(input_ids=ids).logits.log_softmax(-1)
    return logits[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :, 0]


def expected(run: DertaTrainer, references: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The loss as its equations, of separate passes with all their logits."""
    args, model = run.args, run.model
    losses, weights, rewards, nll, nll_weights = [], [], [], [], []
    for chosen, rejected, start, _, triple in sequences(run):
        c, r = log_p(model, chosen, start), log_p(model, rejected, start)
        if args.preference == "dpo":
            values = [
                args.preference_beta * (one.sum() - reference)
                for one, reference in zip((c, r), references[triple.id], strict=True)
            ]
            x = values[0] - values[1]
        elif args.preference == "simpo":
            values = [args.preference_beta * one.mean() for one in (c, r)]
            x = values[0] - values[1] - args.simpo_gamma
        else:
            values = [args.preference_weight * one.mean() for one in (c, r)]
            odds = [one.mean().exp() / (1 - one.mean().exp()) for one in (c, r)]
            x = (odds[0] / odds[1]).log()
            nll += [-c]
            nll_weights += [triple.weight] * len(c)
        losses.append(-F.logsigmoid(x))
        weights.append(triple.weight)
        rewards.append(torch.stack(values))
    for one in run.train_dataset.examples:
        if one.id.startswith("dialogue"):
            ids, is_target = torch.tensor(one.input_ids[None]), torch.tensor(one.is_target)
            nll.append(-log_p(model, ids, 1)[is_target[1:]])
            nll_weights += [one.weight] * len(nll[-1])
    w, v = torch.tensor(weights), torch.tensor(nll_weights)
    pairs = (torch.stack(losses) * w).sum() / w.sum()
    mle = (torch.cat(nll) * v).sum() / v.sum()
    both = torch.stack(rewards).mean(0)
    return {
        "loss": mle + args.preference_weight * pairs,
        "mle_loss": mle,
        "preference_loss": pairs,
        "reward_chosen": both[0],
        "reward_rejected": both[1],
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_trains_what_its_equation_says(tmp_path: Path, loss: str, variant: str) -> None:
    """In float64, with dialogues beside pairs, over several packs and weights of records."""
    model = tiny_model("llama", dtype=torch.float64)
    run = of_pairs(tmp_path, loss, model, max_tokens=260, **VARIANTS[variant])
    assert len(run.train_dataset[0]) > 1
    references, by_key = {}, {}
    for place, (*_, cut, triple) in enumerate(sequences(run)):
        numbers = (-90.0 - place, -95.0 + 2 * place)
        references[triple.id] = by_key[int(pair_keys(triple.id, [cut])[0])] = numbers
    keys = sorted(by_key)
    known = np.array(keys, np.uint64), np.array([by_key[key] for key in keys])
    run.train_dataset.collator.references = References(*known)
    wanted = expected(run, references)
    gradients = torch.autograd.grad(wanted["loss"], list(model.parameters()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run.train()
    log = run.state.log_history[0]
    for name, value in wanted.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-6), name
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert (old - parameter.detach() - gradient).norm() <= 1e-6 * gradient.norm()


def reference_values(run: DertaTrainer, name: str = "train") -> dict[int, tuple[float, float]]:
    held = load_file(reference_file(Path(str(run.args.output_dir)), name))
    return dict(zip(held["keys"].tolist(), map(tuple, held["values"].tolist()), strict=True))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_is_the_model_before_its_first_step(tmp_path: Path, adapted: bool) -> None:
    """Under adapters it is the model without them; and every pair of every epoch is there once."""
    base = tiny_model("llama", dtype=torch.float64)
    model: Any = copy.deepcopy(base)
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    run = of_pairs(tmp_path, "dpo", model, RECORDS[:3], cuts="uniform", max_steps=3, max_tokens=200)
    run.train()
    expected = {}
    for epoch in range(3):
        for chosen, rejected, start, cut, triple in sequences(run, epoch):
            (key,) = pair_keys(triple.id, [cut]).tolist()
            expected[key] = [float(log_p(base, ids, start).sum()) for ids in (chosen, rejected)]
    found = reference_values(run)
    assert found.keys() == expected.keys() and len(found) > 3
    for key, values in found.items():
        assert values == pytest.approx(expected[key], rel=1e-6)


RUN: dict[str, Any] = {
    "examples_per_step": 4,
    "max_steps": 5,
    "max_tokens": 260,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 2,
}


def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reference is that of the first start: no trained model is ever asked."""
    whole = of_pairs(tmp_path / "whole", "dpo", tiny_model("llama"), cuts="uniform", **RUN)
    whole.train()
    folder = tmp_path / "resumed"
    for name in ("checkpoint-2", FOLDER):
        shutil.copytree(tmp_path / "whole" / name, folder / name)
    again = {**RUN, "cuts": "uniform", "resume": "auto"}
    with monkeypatch.context() as patched:
        patched.setattr("derta.training.trainer.compute_references", None)
        resumed = of_pairs(folder, "dpo", tiny_model("llama"), **again)
        resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    logs = [
        [row.get("preference_loss") for row in one.state.log_history] for one in (whole, resumed)
    ]
    assert logs[0] == logs[1]

    again["resume_changed"] = True
    with monkeypatch.context() as patched:  # the two epochs' numbers hold those of one
        patched.setattr("derta.training.trainer.compute_references", None)
        of_pairs(folder, "dpo", tiny_model("llama"), **{**again, "max_steps": 3}).train()
    message = r"reference/train.safetensors does not hold the log probabilities .*: begin the run"
    with pytest.raises(ValueError, match=message):
        of_pairs(folder, "dpo", tiny_model("llama"), **{**again, "max_steps": 7}).train()
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")
    with pytest.raises(ValueError, match=message):
        of_pairs(folder, "dpo", tiny_model("llama"), **again).train()


def test_a_file_of_another_run_or_a_damaged_one_is_not_taken(tmp_path: Path) -> None:
    path = reference_file(tmp_path, "train")
    references = References(np.arange(3, dtype=np.uint64), np.ones((3, 2)))
    write_references(path, references, {"data": "a", "epochs": 3})
    for epochs in (2, 3):
        found = read_references(path, {"data": "a", "epochs": epochs})
        assert found is not None and (found.values == 1).all()
    assert read_references(path, {"data": "a", "epochs": 4}) is None
    assert read_references(path, {"data": "b"}) is None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_references(path, {"data": "a"}) is None
    path.write_bytes(data[:-20])
    assert read_references(path, {"data": "a"}) is None
    with pytest.raises(ValueError, match="^keys must ascend"):
        References(np.zeros(2, np.uint64), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^values must have shape \(3, 2\), got \(3,\)"):
        References(np.arange(3, dtype=np.uint64), np.ones(3))


def test_held_out_pairs_have_a_reference_of_their_own(tmp_path: Path) -> None:
    """They are those of epoch 0 alone, as `evaluate` draws no other."""
    changes = dict(cuts="uniform", max_steps=3, learning_rate=1e-3)
    run = of_pairs(tmp_path, "dpo", records=RECORDS[:3], **changes)
    held_out = run._encode(run.args, iter(RECORDS[1:]), run._encoder(run.args, tiny_tokenizer()))
    run.eval_dataset = run._held_out(run.args, held_out)
    before = run.evaluate()
    assert before["eval_preference_loss"] == pytest.approx(math.log(2))
    assert before["eval_reward_margin"] == before["eval_reward_accuracy"] == 0
    run.train()
    drawn = [run.eval_dataset.losses.collator.draw(one, 0) for one in held_out.examples]
    keys = [key for one in drawn for key in pair_keys(one.example.id, one.cuts).tolist()]
    assert sorted(keys) == sorted(reference_values(run, "eval"))
    figures = run.evaluate()
    assert figures["eval_preference_loss"] < math.log(2) and "eval_asr" in figures
    shares = figures["eval_mle_loss"] + 0.7 * figures["eval_preference_loss"]
    assert figures["eval_loss"] == pytest.approx(shares, rel=1e-6)
    with pytest.raises(ValueError, match="^nothing holds the log .*: give these records as eval_d"):
        run.evaluate(RECORDS[:2])


@pytest.mark.parametrize("loss", LOSSES)
def test_training_raises_the_margin(tmp_path: Path, loss: str) -> None:
    changes = dict(optim="adamw_torch", learning_rate=5e-3, max_steps=4, logging_steps=1)
    run = of_pairs(tmp_path, loss, tiny_model("llama"), RECORDS[:2], **changes)
    run.train()
    first, *_, last = [row for row in run.state.log_history if "reward_margin" in row]
    assert last["reward_margin"] > first["reward_margin"] + 0.05
    assert last["preference_loss"] < first["preference_loss"]


def test_a_row_that_is_no_number_makes_the_loss_none(tmp_path: Path) -> None:
    run = of_pairs(tmp_path, "simpo")
    poison(run.model, 0, loss=True)
    with pytest.raises(FloatingPointError, match="^the loss is not finite at step 1"):
        run.train()


@pytest.mark.parametrize("cuts", ["zero", "uniform"])
def test_a_pair_takes_the_tokens_that_are_planned(cuts: str) -> None:
    objective = PreferenceObjective(
        preference="dpo", preference_beta=0.1, preference_weight=1.0, cuts=cuts
    )
    limits: Any = {"max_length": 512, "max_tokens": 512, "branches": 1, "cuts": cuts}
    encoder = Encoder(tiny_tokenizer(), **limits, closes_harmful=True)
    for example in map(encoder.encode, RECORDS[:4]):
        drawn = [Collator(objective).draw(example, epoch) for epoch in range(20)]
        taken = [pack([one], objective).input_ids.shape[1] for one in drawn]
        assert max(taken) == packed_length(example, objective)


def test_sums_do_not_depend_on_the_order_of_their_rows() -> None:
    columns = {
        "shift_labels": torch.zeros(1, 4000, dtype=torch.int64),
        "rejected_labels": torch.full((1, 4000), -100),
        "pair_back": torch.arange(4000)[None],
    }
    head = Head(torch.zeros(2, 1))
    options: Any = {"refusal_token_id": 0}
    rows = _Rows(torch.zeros(1, 4000, 1), head, columns, options)
    nll = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    sums = [rows.pairs(values, nll).chosen[0] for values in (nll, nll.flip(0), nll.sort()[0])]
    assert sums[0] == sums[1] == sums[2]
    assert float(sums[0]) == pytest.approx(-math.fsum(nll.tolist()), abs=4000 * 2**-37)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": "rlhf"}, "preference must be one of dpo, orpo, simpo, got 'rlhf'"),
        ({"branches": 2}, "branches must be 1 with preference: dpo, which compares one .*, got 2"),
        ({"rto_keep": 0.5}, "rto_keep must be 0 with preference: dpo, whose rows .*, got 0.5"),
        ({"recipe": "derta"}, "recipe: derta trains to say .*: choose vanilla or prefix_only"),
        ({"recipe": "vanilla", "cuts": "uniform"}, "cuts is uniform, which contradicts recipe: v"),
        ({"simpo_gamma": 1.0}, "simpo_gamma is 1, which preference: dpo does not have"),
        (
            {"preference": "orpo", "preference_beta": 1.0},
            "preference_beta is 1, which preference: orpo does not have",
        ),
        ({"preference": None, "preference_weight": 2.0}, "preference_weight is 2, which .*: null "),
        ({"preference_weight": 0.0}, "preference_weight must lie in (0, 1000], got 0"),
        ({"loss_norm": "tokens"}, "loss_norm must be terms with preference: dpo, as a pair is no"),
        ({"unlikelihood_weight": 1.0}, "unlikelihood_weight must be 0.0 with preference: dpo, w"),
        ({"rto_weight": 5.0}, "rto_weight must be 1.0 with preference: dpo, which has no RTO row"),
        ({"rto_depth": "growing"}, "rto_depth must be uniform with preference: dpo, which has no"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"preference": "dpo", **changes}
    with pytest.raises(ValueError, match="^" + message.replace("(0, 1000]", r"\(0, 1000\]")):
        DertaConfig(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": "rlhf"}, "preference must be one of dpo, orpo, simpo, got 'rlhf'"),
        ({"branches": 0}, "branches and rto_keep are both 0"),
        ({"rto_keep": 0.5}, "rto_keep must be 0 with preference: dpo"),
        ({"preference_beta": None}, "preference_beta must be a number for dpo, got None"),
        ({"simpo_gamma": 1.0}, "simpo_gamma must be no number for dpo, got 1.0"),
        ({"preference_beta": 0.0}, "preference_beta must be above 0, got 0.0"),
        ({"preference_weight": -1.0}, "preference_weight must be above 0, got -1.0"),
        (
            {"preference": "simpo", "simpo_gamma": -1.0},
            "simpo_gamma must be at least 0, got -1.0",
        ),
    ],
)
def test_an_objective_with_a_wrong_number_is_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(preference="dpo", preference_beta=0.1, preference_weight=1.0)
    with pytest.raises(ValueError, match=f"^{message}"):
        PreferenceObjective(**given | changes)


def test_settings_choose_the_loss_with_its_own_numbers(tmp_path: Path) -> None:
    def chosen(**changes: Any) -> Any:
        return DertaConfig(output_dir=str(tmp_path), use_cpu=True, **changes).objective

    assert chosen(preference="dpo") == PreferenceObjective(
        preference="dpo", preference_beta=0.1, preference_weight=1.0
    )
    assert chosen(preference="orpo", recipe="prefix_only") == PreferenceObjective(
        preference="orpo", preference_weight=0.1, cuts="uniform"
    )
    assert chosen(preference="simpo", simpo_gamma=0.5) == PreferenceObjective(
        preference="simpo", preference_beta=2.0, preference_weight=1.0, simpo_gamma=0.5
    )
    config = DertaConfig(output_dir=str(tmp_path), use_cpu=True, preference="simpo")
    assert (config.loss_norm, config.trunk_share) == ("terms", 1.0)
    plain = DertaConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (plain.loss_norm, plain.trunk_share) == ("tokens", 1.0)


def test_a_pack_says_what_is_chosen_and_what_is_rejected(tmp_path: Path) -> None:
    run = of_pairs(tmp_path, "simpo", records=[RECORDS[0], RECORDS[-1]], cuts="uniform")
    (pack,) = run.train_dataset[0]
    text = render_pack(pack, run.objective, tiny_tokenizer(), run.refusals.target, color=False)
    assert "1 preference targets" in text
    (cut,) = [line for line in text.split("\n") if "cut, safe 1 chosen -> 'Sorry" in line]
    ((_, rejected, start, _, _),) = sequences(run)
    assert "rejected -> " in cut and text.count("rejected -> ") == rejected.shape[1] - start
    assert text.count("rejected -> '<|eot_id|>'") == text.count("chosen -> '<|eot_id|>'") == 1
    assert "\n" + "dialogue-2" in text and text.count("answer") > 5
    saved = run.train_dataset.tokens.apart - run.train_dataset.tokens.one_pass
    assert saved == start + 2  # the prompt with its prefix, and what is only a label
