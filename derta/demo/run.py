"""The demo's experiment: one base model, tunings of equal length, and their answers to attacks.

For every seed, a world is invented, a tokenizer and a base model are trained on it, copies of that
base are tuned with `DertaTrainer`, and all models are evaluated on held-out requests. Nothing is
cached between runs. Everything runs on the CPU, which is fast enough for such a small model.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from derta.data import Chat, Dialogue, Record, Triple, as_request
from derta.demo.model import new_model, pretrain, pretraining_texts, train_tokenizer
from derta.demo.world import (
    BORDERLINE_TUNING_WORDINGS,
    TEMPLATES,
    HeldOut,
    World,
    held_out_records,
    make_world,
    tuning_records,
)
from derta.evaluation import (
    EvaluationData,
    EvaluationSettings,
    VariantResult,
    evaluate_model,
    summarize,
    write_report,
)
from derta.terminal import say
from derta.training.config import RECIPES, DertaConfig
from derta.training.progress import Progress
from derta.training.trainer import DertaTrainer


@dataclass(frozen=True)
class Variant:
    """A way to tune the base model.

    Attributes:
        settings: arguments of `DertaConfig`.
        borderline: if True, borderline dialogues are part of the tuning data.
    """

    settings: dict[str, Any]
    borderline: bool = False


VARIANTS = {
    **{name: Variant(dict(recipe=name)) for name in RECIPES},
    "derta_balanced": Variant(dict(recipe="derta"), borderline=True),
}
# Run only on request.
ABLATIONS = {
    "rto_only_growing": Variant(dict(recipe="rto_only", rto_depth="growing")),
    "derta_growing": Variant(dict(recipe="derta", rto_depth="growing")),
    "derta_balanced_growing": Variant(dict(recipe="derta", rto_depth="growing"), borderline=True),
}
PREFILL_DEPTHS = (0, 4, 8, 16)
# Shares of the tuning tokens; dense at the start, where most is learned.
CHECKPOINTS = (1 / 16, 1 / 8, 1 / 4, 1)
RATES = ("asr", "over_refusal", "over_refusal_borderline")
EPOCHS = 16  # an upper limit; tuning ends earlier, at its number of tokens


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of a run; with the defaults, a seed takes about six minutes on two cores.

    Args:
        gadgets: number of gadgets in the world; a third are forbidden.
        hidden_size: width of the model.
        base_steps: number of steps of the base model's training.
        tuning_tokens: packed tokens of every tuning, to within one step.
        held_out: number of test requests of each kind.
    """

    gadgets: int = 120
    hidden_size: int = 128
    base_steps: int = 400
    tuning_tokens: int = 250_000
    held_out: int = 240


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The data and the base model that all models of one seed share.

    Attributes:
        seed: seed of all random draws.
        scale: see `Scale`.
        world: the gadgets, recipes and rules.
        tokenizer: tokenizer trained on the world.
        base: model trained to answer everything.
        tuning: tuning records, a triple for every dialogue.
        borderline: dialogues for the variants that are also tuned on them.
        held_out: triples, dialogues and borderline dialogues in wordings outside the tuning data.
    """

    seed: int
    scale: Scale
    world: World
    tokenizer: PreTrainedTokenizerFast
    base: LlamaForCausalLM
    tuning: list[Record]
    borderline: list[Dialogue]
    held_out: HeldOut


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of one tuning.

    Attributes:
        tokens: number of packed tokens in the tuning.
        history: `trainer.state.log_history`.
        checkpoints: rows of teacher-forced rates, see `derta.evaluation.summarize`.
        result: evaluation of the tuned model on held-out requests.
    """

    tokens: int
    history: list[dict[str, float]]
    checkpoints: list[dict[str, float]]
    result: VariantResult


class EvaluateAfter(TrainerCallback):
    """A callback that evaluates held-out records after given steps.

    Args:
        steps: the steps after which to evaluate.
    """

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        control.should_evaluate = state.global_step in self.steps


def run_demo(
    output_dir: Path,
    seeds: Sequence[int],
    scale: Scale = Scale(),
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any]:
    """Train and compare the models; write report and summary.

    Args:
        output_dir: folder for report.html, summary.json and PNGs; also for the first seed's
            `base/`, the base model, and `data/`, the records, as material for other runs. Files
            appear at the end.
        seeds: seeds of the worlds; each has a base model and one model for each variant.
        scale: see `Scale`.
        variants: names from `VARIANTS` and `ABLATIONS`.

    Returns:
        the content of summary.json, see `derta.evaluation.summarize`.
    """
    started = time.perf_counter()
    bases: list[VariantResult] = []
    tunings: dict[str, list[Tuned]] = {name: [] for name in variants}
    with _appearing_at_the_end(output_dir) as scratch:
        for seed in seeds:
            stage = _set_stage(seed, scale)
            if seed == seeds[0]:
                _save_for_own_runs(stage, scratch)
            bases.append(_evaluate(stage.base, stage))
            for name, runs in tunings.items():
                runs.append(_tune(name, stage))
        summary = summarize(
            {"base": bases} | {n: [one.result for one in runs] for n, runs in tunings.items()},
            seconds=time.perf_counter() - started,
            seeds=seeds,
            tokens={n: round(mean(one.tokens for one in runs)) for n, runs in tunings.items()},
            loss={n: _histories(runs) for n, runs in tunings.items()},
            checkpoints={n: [one.checkpoints for one in runs] for n, runs in tunings.items()},
        )
        write_report(summary, scratch)
    return summary


def _set_stage(seed: int, scale: Scale) -> Stage:
    world = make_world(seed, scale.gadgets)
    tokenizer = train_tokenizer(world)
    base = new_model(tokenizer, hidden_size=scale.hidden_size, seed=seed)
    say(
        f"seed {seed}: {len(world.gadgets)} gadgets, {len(world.forbidden)} of them against the "
        f"rules of the guild; a Llama of {base.num_parameters() / 1e6:.1f} M parameters",
    )
    pretrain(
        base,
        tokenizer,
        pretraining_texts(world, tokenizer, seed),
        steps=scale.base_steps,
        seed=seed,
        title=f"{'base':<12}",
    )
    triples, dialogues = tuning_records(world, seed)
    return Stage(
        seed=seed,
        scale=scale,
        world=world,
        tokenizer=tokenizer,
        base=base,
        tuning=[*triples, *dialogues],
        borderline=world.borderline(BORDERLINE_TUNING_WORDINGS),
        held_out=held_out_records(world, scale.held_out, seed),
    )


def _tune(name: str, stage: Stage) -> Tuned:
    model = copy.deepcopy(stage.base)
    with tempfile.TemporaryDirectory() as unused:
        trainer, tokens = tuning(name, stage, model, unused)
        steps = [max(1, round(share * len(tokens))) for share in CHECKPOINTS]
        trainer.add_callback(EvaluateAfter(steps))
        trainer.train()
    history = trainer.state.log_history
    return Tuned(
        tokens=tokens[-1],
        history=history,
        checkpoints=[
            {
                "tokens": tokens[int(row["step"]) - 1],
                **{rate: row[f"eval_{rate}"] for rate in RATES},
            }
            for row in history
            if "eval_asr" in row
        ],
        result=_evaluate(model, stage),
    )


def tuning(
    name: str, stage: Stage, model: LlamaForCausalLM, output_dir: str
) -> tuple[DertaTrainer, list[int]]:
    """Create a trainer of `model`, as the variant `name`, that stops at the tuning's token count.

    Variants pack the same records to different lengths, and cuts are random. Only the packs
    themselves therefore tell how many steps make a number of tokens.

    Returns:
        the trainer, and the packed tokens trained on after each of its steps.
    """
    variant = {**VARIANTS, **ABLATIONS}[name]
    trainer = DertaTrainer(
        model=model,
        args=DertaConfig(
            output_dir=output_dir,
            **variant.settings,
            num_train_epochs=EPOCHS,
            examples_per_step=32,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.98,
            seed=stage.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_steps=5,
            save_strategy="no",
        ),
        train_dataset=[*stage.tuning, *(stage.borderline if variant.borderline else ())],
        eval_dataset=list(itertools.chain(*stage.held_out)),
        processing_class=stage.tokenizer,
        callbacks=[Progress(f"{name:<12}", lines=False)],
    )
    trainer.remove_callback(PrinterCallback)
    steps = trainer.train_dataset
    sizes = (sum(pack.input_ids.shape[1] for pack in steps[step]) for step in range(len(steps)))
    limit = stage.scale.tuning_tokens
    tokens = list(itertools.takewhile(lambda n: n <= limit, itertools.accumulate(sizes)))
    assert 0 < len(tokens) < len(steps), "too few epochs are planned, or one step is too long"
    trainer.args.max_steps = len(tokens)
    return trainer, tokens


def _histories(runs: Sequence[Tuned]) -> list[list[dict[str, float]]]:
    """Return the logged losses, row by row for all seeds, up to the fewest steps of any seed."""
    rows = zip(*([row for row in one.history if "loss" in row] for one in runs), strict=False)
    return [list(history) for history in zip(*rows, strict=True)]


def _evaluate(model: LlamaForCausalLM, stage: Stage) -> VariantResult:
    chat = Chat(stage.tokenizer)
    longest = max(len(chat.tokenizer.tokenize(recipe)) for recipe in stage.world.recipes.values())
    harmful, benign, borderline = (list(map(as_request, records)) for records in stage.held_out)
    return evaluate_model(
        model,
        stage.tokenizer,
        EvaluationData(harmful=harmful, benign=benign, borderline=borderline, helpful=benign),
        EvaluationSettings(
            prefill_depths=PREFILL_DEPTHS,
            templates=TEMPLATES,
            max_new_tokens=longest + 8,
            batch_size=256,
            samples=2,
        ),
    )


def _save_for_own_runs(stage: Stage, folder: Path) -> None:
    stage.base.save_pretrained(folder / "base")
    stage.tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for name, records in (
        ("tuning-safety", [one for one in stage.tuning if isinstance(one, Triple)]),
        ("tuning-helpful", [one for one in stage.tuning if isinstance(one, Dialogue)]),
        ("tuning-borderline", stage.borderline),
        ("held-out-harmful", stage.held_out.harmful),
        ("held-out-helpful", stage.held_out.helpful),
        ("held-out-borderline", stage.held_out.borderline),
    ):
        lines = (json.dumps(_row(record)) + "\n" for record in records)
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _row(record: Record) -> dict[str, Any]:
    row = asdict(record)
    if isinstance(record, Triple):
        del row["messages"]  # equal to prompt; a row has only one of the two
    return row


@contextmanager
def _appearing_at_the_end(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder whose files move to `folder` at the end, and vanish on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        scratch = Path(name)
        yield scratch
        for path in sorted(scratch.rglob("*")):
            target = folder / path.relative_to(scratch)
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
