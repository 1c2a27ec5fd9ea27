"""`derta train`: from a configuration, a model and record files to a tuned model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from derta.cli import ranks
from derta.cli.plan import read_config
from derta.cli.settings.training import TrainSettings
from derta.data import LossShares, SourceRecords, render_pack
from derta.memory import plan
from derta.memory.probe import physical_memory
from derta.memory.step import make_step
from derta.modeling import loading
from derta.modeling.adapters import adapt, check_adapters, quantization
from derta.modeling.offloading import ran_out_of_memory
from derta.modeling.red_flag import add_flag
from derta.objectives.base import Term
from derta.terminal import printable, say
from derta.training.checkpoints import left_by_another, occupied
from derta.training.config import WATCHED, DertaConfig
from derta.training.metrics import figure_names
from derta.training.progress import Progress
from derta.training.refusal_watch import check_watched
from derta.training.rehearsal import check_optimized, rehearse
from derta.training.resumable import RunFinished
from derta.training.settings import check_trained_rows
from derta.training.sharding import running_engine
from derta.training.trainer import DertaTrainer
from derta_kernels.head_loss import chip_of


@dataclass(kw_only=True)
class TrainConfig(TrainSettings, DertaConfig):  # type: ignore[misc]
    """A training run: our settings and transformers'.

    Raises:
        ValueError: as `DertaConfig`, eval_sources and eval_strategy do not go together, no
            evaluation gives metric_for_best_model, adapters would replace their base model, or the
            folder holds another run.
    """

    disable_tqdm: bool | None = True

    def __post_init__(self) -> None:
        if self.dry_run:
            self.shard, self.offload_parameters = "none", False  # it shows a pack, in one process
        DertaConfig.__post_init__(self)
        if not self.sources:
            raise ValueError("sources: expected at least one source, got none")
        if self.eval_sources and self.eval_strategy == "no":
            raise ValueError(
                "eval_sources: nothing would be reported of them while eval_strategy is no, "
                "expected steps or epoch"
            )
        if self.eval_strategy != "no" and not self.eval_sources:
            raise ValueError(
                f"eval_strategy: {SaveStrategy(self.eval_strategy).value} needs eval_sources"
            )
        known = ["loss", *figure_names(self.objective), *WATCHED]
        best = self.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in known:
            raise ValueError(
                f"metric_for_best_model: expected one of {', '.join(known)}, got {best!r}"
            )
        if self.eval_sources:
            check_watched(self.best_by_watching, [source.role for source in self.eval_sources])
        if self.eval_on_start and not self.eval_sources:
            raise ValueError("eval_on_start needs eval_sources")
        check_trained_rows(self.red_flag, self)
        if self.method != "full" and Path(self.output_dir).resolve() == Path(self.model).resolve():
            raise ValueError(
                f"output_dir: {self.output_dir} holds the model that the adapters are for, choose "
                "another folder"
            )
        continues = self.resume or self.resume_from_checkpoint or self.overwrite
        left = left_by_another(Path(self.output_dir))
        if left and not (continues or self.dry_run):
            raise ValueError(occupied(Path(self.output_dir), left))


class Stages(TrainerCallback):
    """Names the step of a run, for errors of several ranks."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        ranks.enter(f"step {state.global_step + 1}")


def load_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """Return the model to tune, with adapters drawn from the run's seed if the method has some.

    A red flag is added to the model and to its tokenizer.
    """
    set_seed(config.seed)
    dtype = loading.weights_dtype(config.dtype, config.device)
    storage = torch.uint8
    if config.shard in ("fsdp", "zero3"):
        storage = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, dtype)
    model = loading.load_model(
        config.model,
        dtype,
        quantization=quantization(config, dtype, storage),
        device=config.device,
    )
    if config.method != "full" and Path(config.model).is_dir():
        # Adapters record this path, and must find it from any working directory.
        model.name_or_path = str(Path(config.model).resolve())
    loading.check_vocabulary(tokenizer, model.config, config.model)
    tokens = []
    if config.red_flag is not None:
        tokens = [add_flag(model, tokenizer, config.red_flag, config.seed)]
    return adapt(model, config, tokens)


def describe(trainer: DertaTrainer) -> str:
    """Describe the refusal tokens, the examples, each source's share, and the tokens saved."""
    steps = trainer.train_dataset
    shares = describe_shares(steps.shares(trainer.args.loss_norm), trainer.objective.terms)
    return (
        f"{trainer.refusals}; "
        f"{len(steps.examples)} examples, {len(steps)} steps, {steps.packs} packs of at most "
        f"{trainer.args.max_tokens} tokens\n{shares}\n{steps.tokens}"
    )


def describe_shares(shares: LossShares, terms: Sequence[Term], rows: int = 10) -> str:
    """Return a table of `loss_shares`: the largest sources first, the rest in one row."""
    named = [(printable(source) or "(unnamed)", share) for source, share in shares.items()]
    if rest := [share for _, share in named[rows:]]:
        total = {term.name: sum(share[term.name] for share in rest) for term in terms}
        named = [*named[:rows], (f"{len(rest)} others", total)]
    width = max(len(source) for source, _ in named)
    return "\n".join(
        [
            "effective share of the loss's weight:",
            *(
                f"  {source:<{width}}  "
                + "   ".join(f"{term.title} {share[term.name]:6.1%}" for term in terms)
                for source, share in named
            ),
        ]
    )


def outcome(trainer: DertaTrainer) -> str:
    """Return the step where a run stopped early and that of the best model, empty without."""
    state, args = trainer.state, trainer.args
    parts = []
    if state.global_step < state.max_steps:
        parts.append(f", stopped at step {state.global_step:,} of {state.max_steps:,}")
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        parts.append(
            f", of step {state.best_global_step:,}: the best by {args.metric_for_best_model}, "
            f"{state.best_metric:.4f}"
        )
    return "".join(parts)


def advice(trainer: DertaTrainer, config: TrainConfig) -> str:
    """Return the plan of the largest pack, after a run has run out of memory."""
    model: Any = trainer.model
    step = make_step(
        model.config,
        config,
        dtype=loading.weights_dtype(config.dtype, config.device),
        checkpointing=config.checkpoints_layers,
        device_type=config.device.type,
        memory=physical_memory(config.device),
        gpus=config.world_size,
    )
    step = replace(
        step,
        shard=running_engine(trainer.accelerator),
        processors=chip_of(config.device).processors,
        refusals=min(step.refusals, len(trainer.refusals.tokens)),
    )
    tokens = trainer.train_dataset.largest().input_ids.shape[1]
    triples = plan.Triples(config.branches, config.trunk_share)
    return f"out of memory; {plan.describe(step, tokens, triples)}"


def run(config: TrainConfig) -> None:
    """Train, and write the tuned model and its tokenizer to `output_dir`."""
    if config.log_level_replica != "warning":  # asked for, see `derta.cli.ranks`
        logging.disable(logging.NOTSET)
    rehearse(config)
    records = SourceRecords(config.sources)
    eval_records = SourceRecords(config.eval_sources)
    records.check()
    eval_records.check()
    tokenizer = loading.load_tokenizer(config.model, config.chat_template)
    if config.method != "full":
        check_adapters(read_config(config.model), config, [0] if config.red_flag else [])
    if config.optim_target_modules is not None:
        check_optimized(config, read_config(config.model))
    model = load_model(config, tokenizer)
    progress = Progress("train")
    trainer = DertaTrainer(
        model=model,
        args=config,
        train_dataset=records,
        eval_dataset=eval_records if config.eval_sources else None,
        processing_class=tokenizer,
        callbacks=[progress, Stages()],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        say(describe(trainer))
    if config.dry_run:
        batch = trainer.train_dataset[0][0]
        color = sys.stdout.isatty()
        refusal = trainer.refusals.target
        shown = render_pack(batch, trainer.objective, tokenizer, refusal, color=color)
        if trainer.is_world_process_zero():
            say(shown, colors=color)
        return
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise MemoryError(advice(trainer, config)) from error
    except RunFinished as finished:
        if trainer.is_world_process_zero():
            say(str(finished))
        return
    finally:
        if progress.bar is not None:  # an error message starts on a line of its own
            progress.bar.close()
    trainer.save_model()
    if trainer.args.should_save:
        say(f"tuned model: {config.output_dir}{outcome(trainer)}")
