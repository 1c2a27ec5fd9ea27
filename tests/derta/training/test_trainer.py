"""The trainer's promises: one gradient however it is computed, exact counts, no silent NaN."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from derta import DertaConfig, DertaTrainer, Triple, apply_derta
from derta.data import (
    Chat,
    PackedBatch,
    PackedSteps,
    Record,
    Rendered,
    plan_packs,
    sequence_length,
)
from derta.evaluation import EvaluationSettings, forced_rates, generate, refusal_curve, response
from derta.training.progress import format_figures
from derta_kernels.attention.layout import Layout
from derta_kernels.head_loss import custom_op
from derta_kernels.testing import HostReads, HostTransfers
from runs import RECORDS, poison, settings, trainer
from tiny import tiny_model, tiny_tokenizer


def test_a_model_proves_itself_where_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, with its kernels: those that are asked for by name run nowhere else."""
    done = []

    def prove(*args: object, **options: object) -> torch.nn.Module:
        done.append("proved")
        return apply_derta(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DertaTrainer, "_move_model_to_device", lambda *_: done.append("moved"))
    monkeypatch.setattr("derta.training.trainer.apply_derta", prove)
    trainer(tmp_path)
    assert done == ["moved", "proved"]


@pytest.mark.parametrize(
    ("dtype", "changes", "warned"),
    [
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"optim_args": "bf16_stochastic_round=True"}, False),
        (torch.float32, {}, False),
    ],
)
def test_updates_that_16_bits_round_away_are_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    changes: dict[str, str],
    warned: bool,
) -> None:
    trainer(tmp_path, tiny_model("llama", dtype=dtype), learning_rate=2e-5, **changes)
    assert ("most updates at learning_rate 2e-05 are too small to count" in caplog.text) == warned


def one_step(
    directory: Path,
    architecture: str = "llama",
    held_out: list[Record] | None = None,
    **changes: object,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one step, as what plain SGD at rate 1 subtracts, and what was logged."""
    tuned = trainer(directory, tiny_model(architecture, dtype=torch.float64), **changes)
    before = {name: value.detach().clone() for name, value in tuned.model.named_parameters()}
    tuned.train()
    after = dict(tuned.model.named_parameters())
    log = dict(tuned.state.log_history[0])
    if held_out is not None:
        log |= tuned.evaluate(held_out)
    return {name: before[name] - after[name].detach() for name in before}, log


def mean_loss(tuned: DertaTrainer, pack: PackedBatch) -> float:
    """The weighted mean over all targets of a pack."""
    total = torch.tensor(pack.totals["mle"].weight + pack.totals["rto"].weight)
    return tuned.model(**pack.model_inputs(), num_items=total).loss.item()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (actual[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
def test_gradients_do_not_depend_on_how_many_packs_a_step_takes(
    tmp_path: Path, loss_norm: str
) -> None:
    expected, log = one_step(tmp_path, loss_norm=loss_norm)
    packs = {1}
    for max_tokens in (500, 260):
        changes = {"loss_norm": loss_norm, "max_tokens": max_tokens}
        steps = trainer(tmp_path, **changes).train_dataset
        packs.add(len(steps[0]))
        actual, other = one_step(tmp_path, **changes)
        assert_same(actual, expected)
        for figure in ("loss", "mle_loss", "rto_loss", "refusal_p_1", "refusal_p_10"):
            assert other[figure] == pytest.approx(log[figure], rel=1e-5), figure
    assert len(packs) == 3


# Makes an uneven number of packs; where ranks share those of one rank, one runs an empty one.
UNEVEN = {"max_tokens": 260}
# The authors' micro-batches, an uneven number too, each with its draws over the padded rows.
MICRO_BATCHES = {"max_tokens": 800, "examples_per_pack": 3, "rto_keep": "official"}
# Of one step each: loss_norm, architecture, records and how packs are formed.
RANKED: list[tuple[str, str, list[Record], dict[str, Any]]] = [
    ("tokens", "llama", RECORDS, UNEVEN),
    ("terms", "llama", RECORDS, UNEVEN),
    ("official", "llama", RECORDS, UNEVEN),
    ("official", "llama", RECORDS, MICRO_BATCHES),
    ("tokens", "mixtral", RECORDS, UNEVEN),
    ("tokens", "llama", RECORDS[:1], UNEVEN),
]


def ranked_steps(directory: Path) -> list[dict[str, dict]]:
    """Gradients and logs of `RANKED`, on one of several ranks."""
    results = []
    for loss_norm, architecture, records, packs in RANKED:
        changes = dict(records=records, loss_norm=loss_norm, ddp_backend="gloo", **packs)
        gradient, log = one_step(directory, architecture, held_out=RECORDS, **changes)
        results.append({"gradient": gradient, "log": log})
    return results


# Of two steps with two packs a rank each; the first is found to be finite.
FAILING = dict(
    max_tokens=180,
    max_length=160,
    max_steps=2,
    logging_first_step=True,
    logging_steps=10,
    save_strategy="steps",
    save_steps=2,
)
# What is not finite on rank 1 alone: after which of its packs, and whether it is a loss.
FAILURES = {
    "first gradients": (2, False),
    "averaged gradients": (3, False),
    "averaged, of a loss": (3, True),
}


def failure(run: DertaTrainer) -> str:
    with pytest.raises(FloatingPointError) as error:
        run.train()
    return str(error.value)


def ranked_failures(directory: Path) -> dict[str, str]:
    """Why runs with `FAILURES` ended, on one of several ranks."""
    said = {}
    for name, (pack, loss) in FAILURES.items():
        run = trainer(directory / name, **FAILING, ddp_backend="gloo")
        if run.args.process_index == 1:
            poison(run.model, pack, loss=loss)
        said[name] = failure(run)
    return said


class LargeShard(TrainerCallback):
    """Lets the last step end with the last norm's weights past use, in the part of one rank."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        if state.global_step == state.max_steps and args.process_index == 1:
            with torch.no_grad():
                model.model.norm.weight.to_local().fill_(1e30)


def sharded_failures(directory: Path) -> list[str]:
    """Why runs with FSDP2 ended, on one of several ranks.

    Of a gradient and of weights that are not finite in the part that rank 1 has of them; rank 0 is
    to blame for that gradient.
    """

    def sharded() -> DertaTrainer:
        model = tiny_model("llama").requires_grad_(False)
        model.model.norm.weight.requires_grad_()
        return trainer(directory, model, **FAILING, shard="fsdp", ddp_backend="gloo")

    run = sharded()
    if run.args.process_index == 0:
        poison(run.model, 2, column=-1)
    said = [failure(run)]
    weight = run.model.model.norm.weight
    assert isinstance(weight, DTensor) and weight.to_local().shape == (16,)
    run = sharded()
    run.add_callback(LargeShard())
    return [*said, failure(run)]


# Ends without Python's own ending, during which a thread of gloo now and then aborts the process.
RANK_SCRIPT = """
import os
import sys
import torch
from pathlib import Path
from test_trainer import ranked_failures, ranked_steps, sharded_failures
folder = Path(sys.argv[1])
results = {
    "steps": ranked_steps(folder),
    "failures": ranked_failures(folder),
    "sharded failures": sharded_failures(folder / "sharded"),
}
torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
torch.distributed.barrier()
os._exit(0)
"""


def test_several_ranks_have_one_gradient_and_fail_as_one(tmp_path: Path) -> None:
    """Two promises in one test: starting the ranks takes most of its time."""
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    tests = Path(__file__).parent
    root = tests.parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "TMPDIR": str(tmp_path),  # so abrupt an end leaves its examples behind
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{tests}:{tests.parents[1]}:{root}:{root / 'kernels'}",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for steps in zip(RANKED, *(results["steps"] for results in ranks), strict=True):
        assert_same_as_one_rank(tmp_path, *steps)
    assert_same_failures(tmp_path, *ranks)
    assert not list(tmp_path.rglob("*.safetensors"))


def assert_same_as_one_rank(
    directory: Path,
    ranked: tuple[str, str, list[Record], dict[str, Any]],
    *results: dict[str, Any],
) -> None:
    """Gradients and figures do not depend on the number of ranks."""
    loss_norm, architecture, records, packs = ranked
    changes = {"loss_norm": loss_norm, "records": records, **packs}
    assert len(trainer(directory, **changes).train_dataset[0]) % 2 == 1
    expected, log = one_step(directory, architecture, RECORDS, **changes)
    assert "imbalance" not in log
    watched = ("eval_loss", "eval_asr", "eval_over_refusal", "eval_trade_off")
    for result in results:
        assert_same(result["gradient"], expected)
        for figure in ("loss", "mle_loss", "rto_loss", "rto_targets", *watched):
            wanted = pytest.approx(log[figure], rel=1e-5)
            assert result["log"][figure] == wanted, (loss_norm, architecture, figure)
        alone = len(records) == 1  # the other rank only waits
        assert result["log"]["imbalance"] == 1.0 if alone else result["log"]["imbalance"] < 0.6


def assert_same_failures(directory: Path, *results: dict[str, Any]) -> None:
    """All ranks stop, and name a rank's own pack where its loss or own gradients tell of it.

    Once gradients are averaged, any rank may be to blame: at the last pack, if sharded at each.
    """
    steps = trainer(directory, **FAILING).train_dataset
    plan = plan_packs(
        steps.plan.lengths,
        max_tokens=FAILING["max_tokens"],
        examples_per_step=len(RECORDS),
        epochs=2,
        seed=42,
        ranks=2,
        costs=steps.plan.costs,
    )
    (other_first, other_last), (first, last) = (
        [
            ", ".join(pack.example_ids)
            for pack in PackedSteps(steps.examples, plan, steps.collator, rank)[1]
        ]
        for rank in range(2)
    )
    gradients = (
        "the gradient norm of model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight and 17 more is not finite at step 2 in"
    )
    end = "; nothing of it was saved"
    for result in results:
        assert result["failures"] == {
            "first gradients": f"{gradients} the pack of examples {first}{end}",
            "averaged gradients": (
                f"{gradients} one of the packs of examples ({other_last}), ({last}){end}"
            ),
            "averaged, of a loss": (
                f"the loss is not finite at step 2 in the pack of examples {last}{end}"
            ),
        }
        assert result["sharded failures"] == [
            "the gradient norm of model.norm.weight is not finite at step 2 in one of the packs of "
            f"examples ({other_first}), ({first}){end}",
            f"the norm of model.norm.weight is not finite after step 2{end}",
        ]


@pytest.mark.parametrize("changes", [{}, {"preference": "dpo", "branches": 1}])
def test_a_step_never_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    tuned = trainer(tmp_path, max_tokens=260, **changes)
    if changes:
        tuned._refer(tuned.train_dataset, None)
    packs = tuned.train_dataset[0]
    assert len(packs) > 1
    reads = HostReads(
        {
            torch.ops.derta.head_loss.default: custom_op.loss_and_gradients,
            torch.ops.derta.head_loss_of_rows.default: custom_op.loss_and_gradients_of_rows,
            torch.ops.derta.scale_gradients.default: custom_op.scale_gradients,
        }
    )
    read_examples = Layout._read_examples

    def uncounted(*arguments: Any) -> Any:
        """Read the mask's values, which attention does on a CPU alone if it has the bounds."""
        assert arguments[1] is not None
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return read_examples(*arguments)

    monkeypatch.setattr(Layout, "_read_examples", uncounted)
    with reads, HostTransfers() as transfers:
        tuned.training_step(tuned.model, packs)
    assert transfers.count == 0 and reads.found == []
    assert all(weight.grad is not None for weight in tuned.model.parameters())


def test_official_norm_is_the_mean_of_pack_means(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, loss_norm="official", max_tokens=500)
    packs = tuned.train_dataset[0]
    assert len(packs) > 1
    losses = [mean_loss(tuned, pack) for pack in packs]
    tuned.train()
    assert tuned.state.log_history[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_terms_are_weighed_by_their_own_means(tmp_path: Path) -> None:
    log = one_step(tmp_path, loss_norm="terms", rto_weight=0.5)[1]
    assert log["loss"] == pytest.approx(log["mle_loss"] + 0.5 * log["rto_loss"], rel=1e-5)


@pytest.mark.parametrize(("tolerance", "share"), [(1 - 1e-9, 1.0), (1e-30, 0.0)])
def test_a_sparse_backward_pass_says_what_it_skipped(
    tmp_path: Path, tolerance: float, share: float
) -> None:
    exact, log = one_step(tmp_path / "exact")
    assert "skipped_gradient" not in log
    sparse, log = one_step(tmp_path / "sparse", sparse_backward=tolerance)
    assert log["skipped_gradient"] == share
    assert f"{share:.2%} of the head's gradient skipped" in format_figures(1, log)
    for name, gradient in sparse.items():
        expected = exact[name] * (1 - share)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_the_scratch_of_the_head_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def rows(count: int, problem: Any, chip: Any, scratch_mb: float | None) -> int:
        given.append(scratch_mb)
        return 128

    monkeypatch.setattr("derta_kernels.head_loss.chunked.chunk_rows", rows)
    one_step(tmp_path / "default")
    one_step(tmp_path / "given", scratch_mb=64)
    assert set(given[: len(given) // 2]) == {None} and set(given[len(given) // 2 :]) == {64}


def answers(pack: PackedBatch) -> list[tuple[int, int]]:
    """Where the dialogues of a pack are."""
    pairs = zip(pack.example_ids, pack.example_bounds, strict=True)
    return [bounds for id, bounds in pairs if id.startswith("dialogue")]


def test_logged_figures_are_those_of_the_batch(tmp_path: Path) -> None:
    tuned = trainer(tmp_path)
    (pack,) = tuned.train_dataset[0]
    output = tuned.model(**pack.model_inputs())
    tuned.train()
    log = tuned.state.log_history[0]
    rto, live = (
        pack.columns["rto_mask"],
        pack.columns["rto_mask"] | (pack.columns["shift_labels"] != -100),
    )
    weight = pack.loss_weight
    mle = (weight * output.rows["mle"]).sum() / weight[pack.columns["shift_labels"] != -100].sum()
    assert log["mle_loss"] == pytest.approx(mle.item())
    refusal = (weight * output.rows["rto"])[rto].sum() / weight[rto].sum()
    assert log["rto_loss"] == pytest.approx(refusal.item())
    assert pack.benign.sum() == sum(
        pack.columns["shift_labels"][0, a:b].ge(0).sum() for a, b in answers(pack)
    )
    benign = torch.exp(-output.rows["rto"][pack.benign]).mean()
    assert log["benign_refusal_p"] == pytest.approx(benign.item(), rel=1e-5)
    assert log["live_rows"] == pytest.approx(live.float().mean().item())
    share = pack.totals["rto"].weight / (pack.totals["rto"].weight + pack.totals["mle"].weight)
    assert log["rto_targets"] == pytest.approx(share)
    assert log["loss"] == pytest.approx(
        (1 - share) * log["mle_loss"] + share * log["rto_loss"], rel=1e-5
    )
    for tenth in range(10):
        rows = rto & (pack.depth_tenth == tenth)
        expected = torch.exp(-output.rows["rto"][rows]).mean().item()
        assert log[f"refusal_p_{tenth + 1}"] == pytest.approx(expected, rel=1e-5)
    assert log["tokens_per_s"] > 0


def test_a_record_that_weighs_twice_is_as_good_as_two(tmp_path: Path) -> None:
    def like(index: int, id: str, weight: float) -> Record:
        return replace(RECORDS[index], id=id, weight=weight)

    changes = dict(branches=1, cuts="zero", loss_norm="terms")  # whose draws are all alike
    twice = [like(0, "a", 2.0), like(6, "b", 2.0), like(1, "c", 1.0)]
    two = [like(i, f"{i}{n}", 1.0) for i, n in ((0, 1), (0, 2), (6, 1), (6, 2), (1, 1))]
    first, second = (one_step(tmp_path, records=these, **changes) for these in (twice, two))
    assert_same(first[0], second[0])
    assert first[1]["loss"] == pytest.approx(second[1]["loss"], rel=1e-6)


def test_weights_below_one_are_weights_too(tmp_path: Path) -> None:
    """The mean is over weights, however small they all are; not over at least one target."""
    records = [replace(record, weight=1e-4) for record in RECORDS]
    equal = [replace(record, weight=1.0) for record in RECORDS]
    assert_same(one_step(tmp_path, records=records)[0], one_step(tmp_path, records=equal)[0])


def test_rto_grows_with_depth_where_it_is_told_to(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, rto_depth="growing", rto_weight=0.5, loss_norm="terms")
    (pack,) = tuned.train_dataset[0]
    output = tuned.model(**pack.model_inputs())
    tuned.train()
    log = tuned.state.log_history[0]
    sums, totals = 0.0, 0.0
    for start, end in pack.example_bounds:
        rows = torch.nonzero(pack.columns["rto_mask"][0, start:end]).flatten() + start
        ramp = torch.arange(1, len(rows) + 1) * 2 / (len(rows) + 1)
        weight = pack.loss_weight[0, rows]
        sums += float((ramp * weight * output.rows["rto"][0, rows]).sum())
        totals += float(weight.sum())
    assert log["rto_loss"] == pytest.approx(sums / totals, rel=1e-5)
    assert log["loss"] == pytest.approx(log["mle_loss"] + 0.5 * log["rto_loss"], rel=1e-5)


def test_rendered_rows_train_beside_triples_and_dialogues(tmp_path: Path) -> None:
    rows = [
        Rendered(prefix="[INST] How? Sure,", text=" step one.", rto=rto, id=f"rendered-{rto}")
        for rto in (True, False)
    ]
    tuned = trainer(tmp_path, records=[*RECORDS, *rows])
    tuned.train()
    assert tuned.state.global_step == 1
    with pytest.raises(ValueError, match="^rendered-True: rto_keep is 0, and a rendered row of"):
        trainer(tmp_path, records=[*RECORDS, *rows], rto_keep=0)


def test_a_dialogue_that_is_too_long_trains_as_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path).train_dataset.examples[-1].input_ids
    limits: dict[str, Any] = {"records": RECORDS[-2:], "max_length": len(whole) - 1}
    skipping = trainer(tmp_path, **limits).train_dataset.examples
    truncating = trainer(tmp_path, **limits, too_long="truncate").train_dataset.examples
    assert (len(skipping), len(truncating)) == (1, 2)
    assert truncating[-1].input_ids.tolist() == whole[:-1].tolist()
    assert "1 of 2 examples, dialogues and rendered rows, lost their end" in caplog.text


def test_neither_a_template_nor_a_pad_token_is_needed(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = tokenizer.pad_token = None
    model = tiny_model("llama", pad_token_id=None)
    rows = [
        Rendered(
            prefix="[INST] How? Sure,", text=" step one. " * (index + 1), rto=rto, id=f"{index}"
        )
        for index, rto in enumerate([True, False, True])
    ]

    def run(refusal: str | int) -> DertaTrainer:
        args = settings(tmp_path, refusal=refusal)
        return DertaTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    with pytest.raises(ValueError, match="^refusal 'Sorry' is looked up in the chat template, and"):
        run("Sorry")
    run(5).train()
    prompts = [[7, 8, 9], [4]]
    limits: dict[str, Any] = {"stop_ids": {3}, "max_new_tokens": 3}
    together = generate(model, prompts, ids=["a", "b"], batch_size=2, **limits)
    apart = [generate(model, [one], ids=["a"], batch_size=1, **limits)[0] for one in prompts]
    assert together == apart


def test_steps_and_schedule_are_known_before_training(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, examples_per_step=4, max_steps=-1, num_train_epochs=2, max_tokens=260)
    tuned.train()
    assert tuned.state.global_step == 2 * math.ceil(len(RECORDS) / 4)
    assert tuned.state.epoch == 2.0


def test_a_forward_that_takes_packs_for_sequences_trains_nothing(tmp_path: Path) -> None:
    """As Liger's does, which it puts in place when training begins, if its fused loss is on."""
    run = trainer(tmp_path)

    def plain(self, input_ids, shift_labels, **kwargs):
        return type(self).forward(self, input_ids=input_ids, labels=shift_labels)

    run.model.forward = MethodType(plain, run.model)
    with pytest.raises(ValueError, match="the model's forward was replaced after apply_derta"):
        run.train()


def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    changes = {
        "examples_per_step": 3,
        "max_steps": 5,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
def test_evaluation_reports_the_loss_of_held_out_records(tmp_path: Path, loss_norm: str) -> None:
    tuned = trainer(tmp_path, loss_norm=loss_norm, rto_weight=0.5)
    figures = tuned.evaluate(RECORDS)
    tuned.train()
    assert figures["eval_loss"] == pytest.approx(tuned.state.log_history[0]["loss"], rel=1e-5)
    tuned.evaluate(RECORDS)
    assert not tuned.model.training
    with pytest.raises(ValueError, match="evaluate needs records"):
        tuned.evaluate()


def test_evaluation_watches_refusal_curves(tmp_path: Path) -> None:
    """Whatever is trained, all positions are watched, of every role apart."""
    model = tiny_model("llama")
    tuned = trainer(tmp_path, model, recipe="vanilla", max_tokens=260, over_refusal_weight=0.25)
    chat, token = Chat(tiny_tokenizer()), tuned.refusals.target
    told = {"harmful": [], "benign": [], "borderline": []}
    for one in RECORDS:
        if isinstance(one, Triple):
            told["harmful"].append(response(chat, one.id, one.messages, one.harmful))
        else:
            read = response(chat, one.id, one.messages[:-1], one.messages[-1]["content"])
            told["borderline" if one.borderline else "benign"].append(read)
    curves = {kind: refusal_curve(model, read, token) for kind, read in told.items()}
    # Some responses are to be stopped and some are not, whatever the tiny model makes of them.
    peaks = sorted(float(curve.max()) for kind in curves for curve in curves[kind])
    depths = EvaluationSettings().prefill_depths
    for certain in ((peaks[4] + peaks[5]) / 2, 2.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("derta.evaluation.measures.curve.certain", lambda _, bar=certain: bar)
            figures = tuned.evaluate(RECORDS)
            expected = forced_rates(curves["harmful"], curves["benign"], depths)
            borderline = forced_rates([], curves["borderline"], depths)["over_refusal"]
        assert figures["eval_asr"] == expected["asr"]
        assert figures["eval_over_refusal"] == expected["over_refusal"]
        assert figures["eval_over_refusal_borderline"] == borderline
        refused = (expected["over_refusal"] + borderline) / 2
        assert figures["eval_trade_off"] == pytest.approx(0.75 * expected["asr"] + 0.25 * refused)
    assert "eval_trade_off" not in tuned.evaluate(RECORDS[:6])
    assert "eval_asr" not in tuned.evaluate(RECORDS[6:])


@pytest.mark.parametrize(
    ("metric", "records", "needed"),
    [
        ("trade_off", RECORDS[:6], "borderline or helpful"),
        ("trade_off", RECORDS[6:], "safety"),
        ("eval_asr", RECORDS[6:], "safety"),
        ("over_refusal", RECORDS[:6], "helpful"),
        ("over_refusal_borderline", RECORDS[:7], "borderline"),
    ],
)
def test_what_decides_on_the_best_checkpoint_has_its_records(
    tmp_path: Path, metric: str, records: list[Record], needed: str
) -> None:
    name = metric.removeprefix("eval_")
    message = f"^metric_for_best_model: {name} needs evaluation records of role {needed}, there"
    with pytest.raises(ValueError, match=message):
        DertaTrainer(
            model=tiny_model("llama"),
            args=settings(tmp_path, metric_for_best_model=metric),
            train_dataset=RECORDS,
            eval_dataset=records,
            processing_class=tiny_tokenizer(),
        )


def test_router_loss_is_averaged_over_the_packs_of_a_step(tmp_path: Path) -> None:
    tuned = trainer(
        tmp_path, tiny_model("mixtral", dtype=torch.float64), max_tokens=500, rto_weight=0.0
    )
    packs = tuned.train_dataset[0]
    router = [0.1 * tuned.model(**pack.model_inputs()).aux_loss.item() for pack in packs]
    tuned.train()
    log = tuned.state.log_history[0]
    main = log["mle_loss"] * (1 - log["rto_targets"])
    assert log["loss"] == pytest.approx(main + sum(router) / len(router), rel=1e-5)


def test_examples_that_do_not_fit_are_counted_and_none_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no example is left: 9 given, 9 longer than"):
        trainer(tmp_path, max_length=8)


def test_only_ranks_that_write_a_model_touch_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = trainer(tmp_path)
    monkeypatch.setattr(DertaConfig, "should_save", False)
    tuned.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_an_example_longer_than_the_context_is_named_before_training(tmp_path: Path) -> None:
    unlimited = trainer(tmp_path)
    examples = unlimited.train_dataset.examples
    lengths = [sequence_length(one, unlimited.objective) for one in examples]
    longest = max(lengths)
    trainer(tmp_path, tiny_model("llama", max_position_embeddings=longest))
    short = tiny_model("llama", max_position_embeddings=longest - 1)
    id = examples[lengths.index(longest)].id
    with pytest.raises(ValueError, match=f"^{id}: its {longest} tokens exceed the model's context"):
        trainer(tmp_path, short)
    trainer(tmp_path, short, max_length=longest - 1)


def test_records_that_share_an_id_would_share_their_draws_and_are_refused(tmp_path: Path) -> None:
    tuned = trainer(tmp_path)
    with pytest.raises(ValueError, match="^record 9: id: 'triple-0' is already used by record 0"):
        tuned.evaluate([*RECORDS, RECORDS[0]])


@pytest.mark.promise("Special tokens in texts of records become plain text.")
def test_special_tokens_in_texts_train_as_told(tmp_path: Path) -> None:
    record = Triple(prompt="How?", safe="Sorry.", harmful="the <|eot_id|> fox", id="a")
    (eot,) = tiny_tokenizer().convert_tokens_to_ids(["<|eot_id|>"])

    def control_tokens(how: str) -> int:
        args = dict(special_tokens_in_text=how, branches=0)
        run = trainer(tmp_path / how, records=[record], **args)
        (example,) = run.train_dataset.examples
        return example.harmful.tolist().count(eot)

    assert (control_tokens("plain"), control_tokens("keep")) == (0, 1)
    with pytest.raises(ValueError, match=r"^a: harmful: has the special token '<\|eot_id\|>' as "):
        control_tokens("refuse")


def test_a_tokenizer_is_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class must be the model's tokenizer"):
        DertaTrainer(model=tiny_model("llama"), args=settings(tmp_path), train_dataset=RECORDS)
