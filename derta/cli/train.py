"""`derta train`: from a configuration, a model and record files to a tuned model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
)

from derta.cli.loading import load_tokenizer, read_files, weights_dtype
from derta.config import DertaConfig
from derta.data import render_pack
from derta.progress import Progress
from derta.trainer import DertaTrainer


@dataclass(kw_only=True)
class Config(DertaConfig):
    """A training run: `DertaConfig`, and where the model and the records are.

    Args:
        model: model folder, or a name on the model hub; weights are read from safetensors only.
        train_files: record files to train on.
        eval_files: record files whose loss is reported.
        chat_template: Jinja text, or a file that holds it, for a tokenizer that has none.
        dtype: of the weights; "auto" is bfloat16 where a GPU computes in it, float32 elsewhere.
        method: "full", or "lora" for adapters on a frozen model.
        lora_r, lora_alpha, lora_dropout, lora_target_modules: as in PEFT.
        dry_run: shows one pack and what its rows are trained to say, and trains nothing.
    """

    model: str
    train_files: list[str]
    output_dir: str = field()
    eval_files: list[str] = field(default_factory=list)
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    method: Literal["full", "lora"] = "full"
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] = "all-linear"
    dry_run: bool = False

    disable_tqdm: bool | None = True


def load_model(config: Config) -> PreTrainedModel | PeftModel:
    dtype = weights_dtype(config.dtype, config.device)
    model = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    if config.method == "full":
        return model
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
    )
    return get_peft_model(model, adapters)


def describe(trainer: DertaTrainer) -> str:
    """One line: what is about to be trained on, and how long it takes."""
    steps = trainer.train_dataset
    packs = [pack for step in steps.plan.steps for pack in step]
    return (
        f"refusal token {trainer.refusal_token.text!r} (id {trainer.refusal_token.id}); "
        f"{len(steps.examples)} examples, {len(steps)} steps, {len(packs)} packs of at most "
        f"{trainer.args.max_tokens} tokens"
    )


def save(trainer: DertaTrainer, directory: Path) -> None:
    """Writes the tuned model beside its place first: an interrupted save leaves no half of one."""
    unfinished = directory / "unfinished"
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        for path in unfinished.iterdir():
            path.replace(directory / path.name)
        unfinished.rmdir()
        print(f"tuned model: {directory}")


def run(config: Config) -> None:
    """Trains, and leaves the tuned model and its tokenizer in `output_dir`."""
    records = read_files(config.train_files)
    eval_records = read_files(config.eval_files)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    trainer = DertaTrainer(
        model=load_model(config),
        args=config,
        train_dataset=records,
        eval_dataset=eval_records or None,
        processing_class=tokenizer,
        callbacks=[Progress("train")],
    )
    trainer.remove_callback(PrinterCallback)
    print(describe(trainer))
    if config.dry_run:
        batch = trainer.train_dataset[0][0]
        print(render_pack(batch, tokenizer, trainer.refusal_token.id, color=sys.stdout.isatty()))
        return
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    save(trainer, Path(config.output_dir))
