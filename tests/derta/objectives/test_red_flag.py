"""A red flag is trained as its equations say, on a token that tokenizer and model then have."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from derta import DertaConfig, DertaTrainer
from derta.cli.merge import MergeConfig, run as merge
from derta.data import Triple, render_pack
from derta.data.tokens.red_flag import flag_of
from derta.modeling.adapters import Method, adapt
from derta.modeling.loading import load_tokenizer, load_tuned
from derta.modeling.red_flag import add_flag, name_flag
from derta.objectives.red_flag import RedFlagObjective
from runs import RECORDS, settings
from tiny import tiny_model, tiny_tokenizer

TEXT = "<|red_flag|>"
FLAG = 400  # the first id after those of the tiny tokenizer
WEIGHT = 0.3
# Every kind of head: its own, tied, with a bias, soft-capped, scaled, and with free rows.
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi": {},
    "gemma2": {},
    "granite": {"vocab_size": 412},
}


def of_flag(
    directory: Path, model: Any, tokenizer: Any = None, *, records: Any = None, **changes: Any
) -> DertaTrainer:
    ours = {"red_flag": "auto", "refusal": "auto", "branches": 0, "retention_weight": WEIGHT}
    return DertaTrainer(
        model=model,
        args=settings(directory, **{**ours, "max_tokens": 260, **changes}),
        train_dataset=iter(RECORDS if records is None else records),
        eval_dataset=iter(RECORDS),
        processing_class=tokenizer or copy.deepcopy(tiny_tokenizer()),
    )


def moved(model: Any) -> None:
    """Move a model away from its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def log_p(model: Any, pack: Any) -> Tensor:
    rows = {name: pack.model_inputs()[name] for name in ("input_ids", "position_ids")}
    return model(**rows, visible_until=pack.visible_until).logits.log_softmax(-1)


def expected(run: DertaTrainer, before: Any, norm: str) -> dict[str, Tensor]:
    """The loss and its terms, of all logits of the model and of the one before its first step."""
    losses: dict[str, list[Tensor]] = {"rto": [], "retention": []}
    weights: dict[str, list[Tensor]] = {"rto": [], "retention": []}
    for pack in run.train_dataset[0]:
        ours, theirs = log_p(run.model, pack), log_p(before, pack)[..., :FLAG]
        theirs = theirs.log_softmax(-1).detach()
        kl = (theirs.exp() * (theirs - ours[..., :FLAG])).sum(-1)
        for name, loss, rows in (
            ("rto", -ours[..., FLAG], pack.columns["rto_mask"]),
            ("retention", kl, pack.columns["shift_labels"] != -100),
        ):
            losses[name].append(loss[rows])
            weights[name].append(pack.loss_weight[rows].double())
    sums = {n: (torch.cat(losses[n]) * torch.cat(weights[n])).sum() for n in losses}
    counts = {n: torch.cat(weights[n]).sum() for n in losses}
    both = counts["rto"] + counts["retention"]
    divisors = counts if norm == "terms" else dict.fromkeys(counts, both)
    return {
        "loss": sums["rto"] / divisors["rto"] + WEIGHT * sums["retention"] / divisors["retention"],
        "rto_loss": sums["rto"] / counts["rto"],
        "retention_loss": sums["retention"] / counts["retention"],
    }


def patched(model: Any, run: DertaTrainer) -> Any:
    """A copy of the model before its first step, that reads packs."""
    from derta import apply_derta

    return apply_derta(copy.deepcopy(model), FLAG, objective=run.objective)


@pytest.mark.parametrize(
    ("architecture", "norm"), [*((one, "terms") for one in HEADS), ("llama", "tokens")]
)
def test_a_step_trains_what_its_equation_says(tmp_path: Path, architecture: str, norm: str) -> None:
    """In float64, over packs of triples and dialogues, away from the reference."""
    model = tiny_model(architecture, dtype=torch.float64, **HEADS[architecture])
    base, tokenizer = copy.deepcopy(model), copy.deepcopy(tiny_tokenizer())
    run = of_flag(tmp_path, model, tokenizer, loss_norm=norm)
    assert flag_of(tokenizer) == FLAG and len(run.train_dataset[0]) > 1
    add_flag(base, copy.deepcopy(tiny_tokenizer()), TEXT, run.args.seed)
    before = patched(base, run)
    moved(model)
    wanted = expected(run, before, norm)
    assert wanted["retention_loss"] > 0.01
    gradients = torch.autograd.grad(wanted["loss"], list(model.parameters()))
    old = [parameter.detach().clone() for parameter in model.parameters()]
    figures = run.evaluate(RECORDS)
    for name, value in wanted.items():
        assert figures[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-6), name
    run.train()
    log = next(row for row in run.state.log_history if "loss" in row)
    for name, value in wanted.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-6), name
    assert 0 < log["refusal_p_1"] < 1 and 0 < log["retention_targets"] < 1
    assert not log.keys() & {"mle_loss", "rto_targets", "benign_refusal_p"}
    for parameter, was, gradient in zip(model.parameters(), old, gradients, strict=True):
        assert (was - parameter.detach() - gradient).norm() <= 1e-6 * gradient.norm()


def test_autocast_trains_to_the_same_figures(tmp_path: Path) -> None:
    """The reference computes in bfloat16 as the model does: at first they differ by the flag."""
    figures = ("loss", "rto_loss", "retention_loss", "grad_norm")
    logs = []
    for bf16 in (False, True):
        changes = dict(bf16=bf16, optim="adamw_torch", learning_rate=5e-3, max_steps=3)
        run = of_flag(tmp_path / str(bf16), tiny_model("llama"), **changes)
        run.train()
        rows = [row for row in run.state.log_history if "loss" in row]
        logs.append([[row[name] for name in figures] for row in rows])
    for ours, theirs, close in zip(*logs, (2e-3, 2e-2, 2e-2), strict=True):
        assert ours == pytest.approx(theirs, rel=close)


@pytest.mark.parametrize("adapted", [False, True])
def test_before_the_first_step_retention_is_the_flags_own_mass(
    tmp_path: Path, adapted: bool
) -> None:
    model: Any = tiny_model("llama", dtype=torch.float64)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if adapted:
        flag = add_flag(model, tokenizer, TEXT, seed=42)
        model = adapt(model, Method(method="lora"), [flag])
    run = of_flag(tmp_path, model, tokenizer)
    found = run.evaluate(RECORDS)["eval_retention_loss"]
    total = weight = 0.0
    with torch.no_grad():
        for pack in run.train_dataset[0]:
            rows = pack.columns["shift_labels"] != -100
            mass = -torch.log1p(-log_p(run.model.eval(), pack)[..., FLAG].exp())
            total += (mass * pack.loss_weight)[rows].sum().item()
            weight += pack.loss_weight[rows].sum().item()
    assert found == pytest.approx(total / weight, rel=1e-6) and found > 0


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", dtype=torch.float64)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    flag = add_flag(model, tokenizer, TEXT, seed=42)
    base = copy.deepcopy(model)
    run = of_flag(tmp_path, adapt(model, Method(method="lora"), [flag]), tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:  # 0 at first, where both are the same model
                parameter.normal_(std=0.1)
    run.model.eval()
    wanted = expected(run, patched(base, run), "terms")["retention_loss"].item()
    assert wanted > 0.01
    found = run.evaluate(RECORDS)["eval_retention_loss"]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["own head", "tied", "free rows"])
def test_a_flag_is_one_token_of_tokenizer_and_model_that_a_folder_keeps(
    tmp_path: Path, kind: str
) -> None:
    sizes = {"vocab_size": 416} if kind == "free rows" else {}
    model: Any = tiny_model("qwen2" if kind == "tied" else "llama", **sizes)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    tokenizer = copy.deepcopy(tiny_tokenizer())
    twin, again = copy.deepcopy(model), copy.deepcopy(tiny_tokenizer())
    assert add_flag(model, tokenizer, TEXT, seed=3) == FLAG == flag_of(tokenizer)
    assert flag_of(tiny_tokenizer()) is None
    rows = model.get_input_embeddings().weight
    assert len(rows) == model.config.vocab_size == (416 if kind == "free rows" else FLAG + 1)
    assert torch.equal(rows[:FLAG], embeddings[:FLAG])
    mean, size = embeddings[:FLAG].mean(0), embeddings[:FLAG].square().mean().sqrt()
    noise = (rows[FLAG] - mean).square().mean().sqrt() / size
    assert 0.05 < noise < 0.2
    is_tied = model.get_output_embeddings().weight is rows
    assert is_tied == (kind == "tied")
    assert FLAG in model.generation_config.eos_token_id
    add_flag(twin, again, TEXT, seed=3)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    # What is there is left as it is.
    with torch.no_grad():
        rows[FLAG] += 1
    kept = rows.detach().clone()
    assert add_flag(model, tokenizer, TEXT, seed=4) == FLAG and torch.equal(rows, kept)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, read = load_tuned(tmp_path, torch.float32, None)
    assert flag_of(read) == FLAG and read.decode([FLAG], skip_special_tokens=True) == ""
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["own head", "tied"])
def test_adapters_train_the_flags_row_alone_and_are_read_again(tmp_path: Path, kind: str) -> None:
    base: Any = tiny_model("qwen2" if kind == "tied" else "llama")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"), None)
    flag = add_flag(base, tokenizer, TEXT, seed=42)
    tables = [
        copy.deepcopy(one.weight.detach())
        for one in (base.get_input_embeddings(), base.get_output_embeddings())
    ]
    model: Any = adapt(base, Method(method="lora", lora_r=4), [flag])
    changes: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.1}
    run = of_flag(tmp_path / "run", model, tokenizer, **changes)
    run.train()
    is_tied = kind == "tied"
    for table, before, rows in zip(
        (base.get_input_embeddings(), base.get_output_embeddings()),
        tables,
        ([flag] if is_tied else [], [flag]),
        strict=True,
    ):
        changed = (table.weight != before).any(-1).nonzero().flatten().tolist()
        assert changed == rows
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert ["trainable_tokens" in name for name in trained if "lora" not in name] == [True]
    run.save_model()
    size = (tmp_path / "run" / "adapter_model.safetensors").stat().st_size
    assert size < 2 * sum(one.numel() * 4 for one in model.parameters() if one.requires_grad)
    ids = torch.tensor([[5, 6, 7, 9]])
    wanted = model.eval()(input_ids=ids).logits
    loaded, read = load_tuned(tmp_path / "run", torch.float32, None)
    assert flag_of(read) == flag
    assert torch.allclose(loaded.eval()(input_ids=ids).logits, wanted, atol=1e-5)
    folder = str(tmp_path / "merged")
    merge(MergeConfig(model=str(tmp_path / "run"), output_dir=folder, dtype="float32"))
    merged, read = load_tuned(tmp_path / "merged", torch.float32, None)
    assert flag_of(read) == flag and flag in merged.generation_config.eos_token_id
    assert torch.allclose(merged.eval()(input_ids=ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, adapted: bool) -> None:
    """Its reference is the model before its first step, and not the checkpoint."""
    changes: dict[str, Any] = {
        "examples_per_step": 4,
        "max_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def started(folder: Path, **more: Any) -> DertaTrainer:
        model: Any = tiny_model("llama")
        tokenizer = copy.deepcopy(tiny_tokenizer())
        if adapted:
            flag = add_flag(model, tokenizer, TEXT, seed=42)
            torch.manual_seed(0)
            model = adapt(model, Method(method="lora", lora_r=4), [flag])
        return of_flag(folder, model, tokenizer, **changes, **more)

    whole = started(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = started(tmp_path / "again", resume="auto")
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    losses = [
        [row["retention_loss"] for row in one.state.log_history if "loss" in row]
        for one in (whole, resumed)
    ]
    assert losses[0] == losses[1] and losses[0][-1] > losses[0][0]


def test_only_packs_with_dialogues_run_the_reference(tmp_path: Path) -> None:
    run = of_flag(tmp_path, tiny_model("llama", dtype=torch.float64), max_tokens=100)
    packs = run.train_dataset[0]
    with_dialogues = [any(i.startswith("dialogue") for i in one.example_ids) for one in packs]
    assert True in with_dialogues and False in with_dialogues
    asked = []
    own = run.reference
    run.reference = lambda inputs: asked.append(inputs) or own(inputs)  # type: ignore
    run.train()
    assert len(asked) == sum(with_dialogues)


def test_a_flag_that_nothing_holds_back_is_refused(tmp_path: Path) -> None:
    triples = [record for record in RECORDS if isinstance(record, Triple)]
    with pytest.raises(ValueError, match="^red_flag needs dialogues among the training records, r"):
        of_flag(tmp_path, tiny_model("llama"), records=triples)


def test_a_dry_run_shows_both_terms(tmp_path: Path) -> None:
    run = of_flag(tmp_path, tiny_model("llama"), max_tokens=4096)
    (pack,) = run.train_dataset[0]
    assert run.refusals.target == FLAG and run.refusals.warning is None
    shown = render_pack(pack, run.objective, run.processing_class, FLAG, color=False)
    assert f"refusal token '{TEXT}'" in shown and "-> red flag" in shown
    assert "as before, here ' quick'" in shown and " safe " not in shown.split("triple-0")[1]
    assert set(run.train_dataset.shares("terms")[""]) == {"rto", "retention"}


def test_a_pack_without_its_reference_is_refused(tmp_path: Path) -> None:
    run = of_flag(tmp_path, tiny_model("llama"), max_tokens=4096)
    with pytest.raises(ValueError, match="^reference must have the reference_hidden and"):
        run.model(**run.train_dataset[0][0].model_inputs())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(recipe="derta"), "^red_flag and recipe: derta both say what triples train: leave"),
        (dict(preference="dpo"), "^red_flag and preference: dpo both say what triples train"),
        (dict(cuts="deep"), "^cuts must be left out with red_flag, as no safe response follows a"),
        (dict(branches=1), "^branches must be 0 with red_flag, at which an answer ends, got 1"),
        (dict(rto_keep=0.0), "^branches and rto_keep are both 0: a triple would train nothing"),
        (dict(rto_weight=2.0), "^rto_weight must be 1 with red_flag, got 2: weigh retention_weig"),
        (dict(refusal="Sorry"), "^refusal must be left out with red_flag, which is the refusal"),
        (dict(refusal_tokens="auto"), "^refusal_tokens must be left out with red_flag, which is"),
        (dict(unlikelihood_weight=0.1), "^unlikelihood_weight must be left out with red_flag"),
        (dict(retention_weight=0.0), r"^retention_weight must lie in \(0, 1000\], got 0"),
        (dict(red_flag=" x"), "^red_flag must be auto or a text without spaces around it, got ' x"),
        (dict(red_flag=None, retention_weight=2.0), "^retention_weight is 2 without red_flag: lea"),
    ],
)
def test_keys_that_contradict_a_flag_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    given = {"red_flag": "auto", "output_dir": str(tmp_path), "use_cpu": True, **keys}
    with pytest.raises(ValueError, match=message):
        DertaConfig(**given)


def test_settings_choose_the_objective_and_the_text(tmp_path: Path) -> None:
    config = DertaConfig(output_dir=str(tmp_path), use_cpu=True, red_flag="auto", rto_keep=0.5)
    assert config.objective == RedFlagObjective(rto_keep=0.5)
    assert config.red_flag == TEXT and config.loss_norm == "terms"


def test_tokens_that_are_no_flag_are_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    with pytest.raises(
        ValueError, match=r"^red_flag must be a text that is no token yet, got '<\|eot"
    ):
        name_flag(tokenizer, "<|eot_id|>")
    name_flag(tokenizer, TEXT)
    with pytest.raises(
        ValueError, match=r"^red_flag must be <\|red_flag\|>, which the tokenizer has"
    ):
        name_flag(tokenizer, "<|other|>")


def test_adapters_that_do_not_train_the_flag_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(ValueError, match="^red_flag must be added before adapters, which train"):
        of_flag(tmp_path, adapt(model, Method(method="lora")))
    with pytest.raises(ValueError, match="^Phi.* has a bias on its head, which PEFT drops"):
        adapt(tiny_model("phi"), Method(method="lora"), [5])
