"""The demo's experiment: one base model, tunings of equal length, and their answers to attacks.

For every seed, a world gives a base model and records, copies of the base are tuned with
`DertaTrainer`, and all models are evaluated on held-out requests. Every result is kept as soon as
it is there, so that the same command continues a killed run. Everything runs on the CPU.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from derta.data import Dialogue, Record, Triple, as_request
from derta.demo.parts import Parts
from derta.demo.world import Stage, World
from derta.evaluation import (
    Defence,
    EvaluationData,
    VariantResult,
    evaluate_model,
    summarize,
    write_report,
)
from derta.objectives.defaults import PREFERENCES
from derta.training.config import RECIPES, DertaConfig
from derta.training.progress import Progress
from derta.training.trainer import DertaTrainer

T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """A way to tune the base model.

    Attributes:
        settings: arguments of `DertaConfig`.
        borderline: if True, borderline dialogues are part of the tuning data.
    """

    settings: dict[str, Any]
    borderline: bool = False


@dataclass(frozen=True)
class Baseline:
    """A defence at inference, without a tuning of its own.

    Attributes:
        of: the model that answers: the name of a variant, or "base".
        reinsert_header: if True, its header is put in again; else it has the world's system prompt.
    """

    of: str
    reinsert_header: bool

    def defence(self, world: World) -> Defence:
        """Return the defence in a world."""
        if self.reinsert_header:
            return Defence(reinsert_header=True, header_after=HEADER_AFTER)
        return Defence(system_prompt=world.system_prompt)


VARIANTS = {
    **{name: Variant(dict(recipe=name)) for name in RECIPES},
    "derta_balanced": Variant(dict(recipe="derta"), borderline=True),
}
# Run only on request.
ABLATIONS: dict[str, Variant] = {
    "rto_only_growing": Variant(dict(recipe="rto_only", rto_depth="growing")),
    "derta_growing": Variant(dict(recipe="derta", rto_depth="growing")),
    "derta_balanced_growing": Variant(dict(recipe="derta", rto_depth="growing"), borderline=True),
    **{
        f"derta_unlikelihood_{weight}": Variant(dict(recipe="derta", unlikelihood_weight=weight))
        for weight in (0.03, 0.1, 0.3, 1.0)
    },
    "derta_refusal_tokens": Variant(dict(recipe="derta", refusal_tokens="auto")),
    "derta_balanced_refusal_tokens": Variant(
        dict(recipe="derta", refusal_tokens="auto"), borderline=True
    ),
    **{name: Variant(dict(preference=name)) for name in PREFERENCES},
    "dpo_prefixed": Variant(dict(preference="dpo", recipe="prefix_only")),
    "red_flag": Variant(dict(red_flag="auto")),
    "red_flag_balanced": Variant(dict(red_flag="auto"), borderline=True),
}
BASELINES = {
    "system_prompt": Baseline("base", reinsert_header=False),
    "vanilla_header": Baseline("vanilla", reinsert_header=True),
}
# Tokens of an answer before the header, where no attacker wrote any: fewer than of any answer.
HEADER_AFTER = 8
RATES = ("asr", "over_refusal", "over_refusal_borderline")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of one model, and of its tuning if it had one.

    Attributes:
        tokens: number of packed tokens in the tuning.
        history: `trainer.state.log_history`.
        checkpoints: rows of teacher-forced rates, see `derta.evaluation.summarize`.
        result: evaluation of the tuned model on held-out requests.
        seconds: duration of the tuning and the evaluation.
    """

    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoints: list[dict[str, float]] = field(default_factory=list)
    result: VariantResult = VariantResult()
    seconds: float = 0.0


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
    world: World,
    output_dir: Path,
    seeds: Sequence[int],
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any]:
    """Train and compare the models; write report and summary.

    Args:
        world: the world and its sizes.
        output_dir: folder for report.html, summary.json and PNGs, which appear at the end; for
            `parts/`, the results that a later run need not make again; and for the first seed's
            `base/`, the base model, and `data/`, the records, as material for other runs.
        seeds: seeds of the stages; each has a base model and one model for each variant.
        variants: names from `VARIANTS`, `ABLATIONS` and `BASELINES`.

    Returns:
        the content of summary.json, see `derta.evaluation.summarize`; its seconds are those of all
        parts.
    """
    results: dict[str, list[Tuned]] = {name: [] for name in ("base", *variants)}
    # What is answered by one model comes together, so that it is tuned once.
    models = list(dict.fromkeys(map(tuned_as, results)))
    order = sorted(results, key=lambda name: models.index(tuned_as(name)))
    for seed in seeds:
        run = _SeedRun(world, seed, Parts(output_dir / "parts"))
        if seed == seeds[0]:
            run.kept("exported", str, functools.partial(run.export, output_dir))
        for name in order:
            results[name].append(run.kept(name, Tuned, functools.partial(run.result, name)))
    bases = results.pop("base")
    summary = summarize(
        {"base": [one.result for one in bases]}
        | {name: [one.result for one in runs] for name, runs in results.items()},
        seconds=sum(one.seconds for runs in (bases, *results.values()) for one in runs),
        seeds=seeds,
        tokens={n: round(mean(one.tokens for one in runs)) for n, runs in results.items()},
        loss={n: _histories(runs) for n, runs in results.items()},
        checkpoints={n: [one.checkpoints for one in runs] for n, runs in results.items()}
        if world.checkpoints
        else None,
    )
    with _appearing_at_the_end(output_dir) as scratch:
        write_report(summary, scratch)
    return summary


class _SeedRun:
    """The models of one seed."""

    def __init__(self, world: World, seed: int, parts: Parts) -> None:
        self.world = world
        self.seed = seed
        self.parts = parts
        self._last: tuple[str, tuple[PreTrainedModel, PreTrainedTokenizerBase, Tuned]] | None = None

    @functools.cached_property
    def stage(self) -> Stage:
        return self.world.stage(self.seed, self.parts)

    def kept(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """Return a part of this seed, see `Parts.kept`."""
        settings = [
            type(self.world).__name__,
            self.world,
            self.world.training,
            self.world.checkpoints,
            self.world.system_prompt,
            self.world.evaluation(),
            known_variants().get(name),
            known_variants().get(tuned_as(name)),
            HEADER_AFTER,
        ]
        return self.parts.kept(f"seed-{self.seed}-{name}", settings, kind, make)

    def export(self, folder: Path) -> str:
        """Write the base model and the records; return the folder."""
        _export(self.stage, folder)
        return str(folder)

    def result(self, name: str) -> Tuned:
        """Tune and evaluate a variant; evaluate the base model, or a baseline."""
        started = time.perf_counter()
        baseline = BASELINES.get(name)
        defence = None if baseline is None else baseline.defence(self.world)
        model, tokenizer, tuned = self._tuned(tuned_as(name))
        return replace(
            tuned,
            result=self._evaluate(model, tokenizer, defence),
            seconds=time.perf_counter() - started,
        )

    def _tuned(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tuned]:
        """Return a model with its tokenizer and tuning, yet without a result; one is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._tune(name)
        return self._last[1]

    def _tune(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tuned]:
        stage = self.stage
        if name == "base":
            return stage.base, stage.tokenizer, Tuned()
        model = copy.deepcopy(stage.base)
        with tempfile.TemporaryDirectory() as unused:
            trainer, tokens = tuning(name, self.world, self.seed, stage, model, unused)
            shares = self.world.checkpoints
            steps = [max(1, round(share * len(tokens))) for share in shares]
            trainer.add_callback(EvaluateAfter(steps))
            trainer.train()
        history = trainer.state.log_history
        tuned = Tuned(
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
        )
        return model, trainer.processing_class, tuned

    def _evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, defence: Defence | None
    ) -> VariantResult:
        harmful, benign, borderline = (
            list(map(as_request, records)) for records in self.stage.held_out
        )
        return evaluate_model(
            model,
            tokenizer,
            EvaluationData(
                harmful=harmful,
                benign=benign,
                borderline=borderline,
                helpful=benign,
                refusals=[one.safe for one in self.stage.tuning if isinstance(one, Triple)],
            ),
            replace(self.world.evaluation(), defence=defence),
        )


def tuned_as(name: str) -> str:
    """Return the name of the model that answers: of a baseline, the one that it defends."""
    return BASELINES[name].of if name in BASELINES else name


def known_variants() -> dict[str, Variant | Baseline]:
    """Return the variants of every run, and those of a run that asks for them."""
    return {**VARIANTS, **ABLATIONS, **BASELINES}


def tuning(
    name: str, world: World, seed: int, stage: Stage, model: PreTrainedModel, output_dir: str
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
            **{**world.training, **variant.settings},
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_steps=5,
            save_strategy="no",
        ),
        train_dataset=[*stage.tuning, *(stage.borderline if variant.borderline else ())],
        eval_dataset=list(itertools.chain(*stage.held_out)),
        processing_class=copy.deepcopy(stage.tokenizer),  # a red flag is added to it
        callbacks=[Progress(f"{name:<12}", lines=False)],
    )
    trainer.remove_callback(PrinterCallback)
    steps = trainer.train_dataset
    sizes = (sum(pack.input_ids.shape[1] for pack in steps[step]) for step in range(len(steps)))
    limit = world.tuning_tokens
    tokens = list(itertools.takewhile(lambda n: n <= limit, itertools.accumulate(sizes)))
    assert 0 < len(tokens) < len(steps), "too few epochs are planned, or one step is too long"
    trainer.args.max_steps = len(tokens)
    return trainer, tokens


def _histories(runs: Sequence[Tuned]) -> list[list[dict[str, float]]]:
    """Return the logged losses, row by row for all seeds, up to the fewest steps of any seed."""
    rows = zip(*([row for row in one.history if "loss" in row] for one in runs), strict=False)
    return [list(history) for history in zip(*rows, strict=True)]


def _export(stage: Stage, folder: Path) -> None:
    with _appearing_at_the_end(folder) as scratch:
        stage.base.save_pretrained(scratch / "base")
        stage.tokenizer.save_pretrained(scratch / "base")
        (scratch / "data").mkdir()
        for name, records in (
            ("tuning-safety", [one for one in stage.tuning if isinstance(one, Triple)]),
            ("tuning-helpful", [one for one in stage.tuning if isinstance(one, Dialogue)]),
            ("tuning-borderline", stage.borderline),
            ("held-out-harmful", stage.held_out.harmful),
            ("held-out-helpful", stage.held_out.helpful),
            ("held-out-borderline", stage.held_out.borderline),
        ):
            lines = (json.dumps(_row(record)) + "\n" for record in records)
            (scratch / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


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
