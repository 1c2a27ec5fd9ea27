"""`derta eval tamper`: attack success before and after fine-tuning by an attacker.

Whoever has the weights can tune a refusal away. How many steps, on how many examples, that takes is
measured here on a copy in memory: next-token loss on harmful responses, or on harmless dialogues,
which alone are known to wear a refusal off. Source: arXiv 2310.03693.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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

from derta.cli.eval.evaluate import (
    answers_file,
    answers_folder,
    evaluation_settings,
    model_folders,
    read_data,
    read_files,
    report,
    safe_responses,
    whole_model,
)
from derta.cli.settings.evaluation import TamperConfig
from derta.data import Chat, Dialogue
from derta.data.records.duplicates import normalized
from derta.data.records.reading import Reading
from derta.evaluation import (
    Answered,
    AnswerFile,
    EvaluationData,
    ModelGenerator,
    collect_answers,
    find_refusal_token,
    fingerprint,
    judge_answers,
    summarize,
)
from derta.evaluation.evaluate import answered_dialogue, refuse_what_takes_responses
from derta.evaluation.measures.results import forced_outcomes
from derta.modeling.adapters import adapt, merge
from derta.modeling.loading import find_device, load_tuned, weights_dtype
from derta.modeling.method import Method
from derta.terminal import say
from derta.training.config import DertaConfig
from derta.training.progress import Progress
from derta.training.trainer import DertaTrainer

TITLE = "Attack success after fine-tuning by an attacker"
TOLD = ("method", "lora_r", "lora_alpha", "learning_rate", "examples_per_step", "seed")


class MeasureAfter(TrainerCallback):
    """A callback that measures the model after given steps.

    Args:
        steps: the steps after which to measure.
        measure: measures the model that it is given, after the number of steps.
    """

    def __init__(self, steps: Collection[int], measure: Callable[[Any, int], None]) -> None:
        self.steps = steps
        self.measure = measure

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> None:
        if state.global_step in self.steps:
            self.measure(objects["model"], state.global_step)


def read_examples(config: TamperConfig) -> dict[str, list[Dialogue]]:
    """Read the examples that the attacker tunes on, by their kind.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: as `read_requests`, or an example has no response.
    """
    reading = Reading()
    harmful = read_files(config, config.tune_harmful, "harmful", reading)
    harmless = read_files(config, config.tune_harmless, "harmless", reading)
    return {
        kind: [
            answered_dialogue(request, "one to tune on")
            for request in requests[: config.tune_examples]
        ]
        for kind, requests in (("harmful", harmful), ("harmless", harmless))
        if requests
    }


def check_device(config: TamperConfig) -> None:
    """Refuse several GPUs, of which a trainer would take the first, or all.

    Raises:
        ValueError: several are visible, or as `find_device`.
    """
    count = torch.cuda.device_count()
    if find_device(config.device).type == "cuda" and count > 1:
        raise ValueError(
            f"device: {config.device}: the attacker tunes on one GPU, got {count} visible: set "
            "CUDA_VISIBLE_DEVICES to one of them, and leave device out"
        )


def seen_requests(data: EvaluationData, examples: Mapping[str, list[Dialogue]]) -> int:
    """Count the harmful requests of the evaluation that the attacker tunes on."""
    tuned = {normalized(one.messages[-2]["content"]) for many in examples.values() for one in many}
    return sum(normalized(request.prompt) in tuned for request in data.harmful)


def load_whole(
    config: TamperConfig, folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model, adapters folded into it, on the device, and its tokenizer.

    In 16 bits, weights lose most updates to rounding, and a defense would look stronger than it is.

    Raises:
        ValueError, OSError: as `load_tuned`.
    """
    device = find_device(config.device)
    exact = config.dtype == "auto" and config.method == "full"
    dtype = weights_dtype("float32" if exact else config.dtype, device)
    loaded: Any
    loaded, tokenizer = load_tuned(folder, dtype, config.chat_template)
    model: Any = merge(loaded) if isinstance(loaded, PeftModel) else loaded
    model.requires_grad_(True)
    return model.to(device), tokenizer


def trainer_of(
    config: TamperConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Dialogue]],
    refusal_token_id: int | Sequence[int],
    output_dir: str,
) -> DertaTrainer:
    """Return the attacker's trainer, of ordinary next-token loss; it saves nothing."""
    set_seed(config.seed)
    method = Method(
        method=config.method,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
    )
    refusal: dict[str, Any] = {"refusal": refusal_token_id}
    if not isinstance(refusal_token_id, int):
        refusal = {"refusal_tokens": list(refusal_token_id)}
    on_cpu = model.device.type == "cpu"
    trainer = DertaTrainer(
        model=adapt(model, method),
        args=DertaConfig(
            output_dir=output_dir,
            **refusal,
            examples_per_step=config.examples_per_step,
            max_steps=max(config.steps),
            max_length=config.max_length,
            max_tokens=max(config.max_tokens, config.max_length),
            too_long="truncate",
            special_tokens_in_text=config.special_tokens_in_text,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            seed=config.seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=[one for many in examples.values() for one in many],
        processing_class=tokenizer,
        callbacks=[Progress("tamper", lines=False)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def name_of(steps: int) -> str:
    """Return the name of the model after some steps."""
    return f"{steps:,} step{'s' * (steps > 1)}" if steps else "before"


def identity(
    config: TamperConfig, folder: Path, examples: Mapping[str, list[Dialogue]], steps: int
) -> str:
    """Return the identity of the model after some steps, by which its answers are found again.

    Equal tuning is taken for an equal model, although a GPU may round sums otherwise.
    """
    tuned = {}
    if steps:
        said = [[one.messages for one in many] for many in examples.values()]
        keys = (*TOLD, "max_length", "max_tokens", "special_tokens_in_text", "chat_template")
        tuned = {
            **{key: getattr(config, key) for key in keys},
            "examples": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
            "steps": [steps, max(config.steps)],
        }
    return fingerprint(
        *whole_model(folder), dtype=config.dtype, full=config.method == "full", **tuned
    )


def tamper(config: TamperConfig) -> dict[str, Any]:
    """Return the summary of the model before and after each number of steps.

    Beside what `summarize` returns, each variant has its "steps", and "tamper" tells the attack.

    Raises:
        FileNotFoundError: the model or a file does not exist.
        ValueError: as `check_device`, `read_examples`, `evaluation_settings`, `collect_answers` and
            `DertaTrainer`.
        FloatingPointError: as `DertaTrainer`.
    """
    started = time.perf_counter()
    check_device(config)
    (folder,) = model_folders(config.model).values()
    triples = safe_responses(config)
    data = dataclasses.replace(read_data(config), refusals=[one.safe for one in triples])
    examples = read_examples(config)
    kept = answers_folder(config)
    settings = evaluation_settings(config)
    refuse_what_takes_responses(data, settings)
    if seen := seen_requests(data, examples):
        say(
            f"note: the attacker tunes on {seen} of the {len(data.harmful)} harmful requests, so "
            "that success on them is memory",
            error=True,
        )
    model, tokenizer = load_whole(config, folder)
    refusal = find_refusal_token(model, tokenizer, config.refusal, triples)
    settings = dataclasses.replace(settings, refusal=refusal)
    answered: dict[int, Answered] = {}

    def measure(tuned: Any, steps: int) -> None:
        file = answers_file(config, name_of(steps))
        generator = ModelGenerator(
            tuned,
            Chat(tokenizer),
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            answers=AnswerFile(file, tokenizer, identity(config, folder, examples, steps)),
        )
        answered[steps] = collect_answers(tuned, tokenizer, data, settings, generator=generator)

    with tempfile.TemporaryDirectory() as unused:
        # Before the first answer, as it may refuse an example.
        trainer = trainer_of(config, model, tokenizer, examples, refusal, unused)
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.chmod(0o700)
        measure(trainer.model, 0)
        trainer.add_callback(MeasureAfter(config.steps, measure))
        trainer.train()
        history = trainer.state.log_history
        del trainer, model  # judges may need their memory
    depths = [depth for depth in settings.prefill_depths if isinstance(depth, int)]
    results = {
        steps: dataclasses.replace(
            result,
            outcomes=(*result.outcomes, *forced_outcomes(result, depths)),
        )
        for steps, result in zip(
            answered, judge_answers(list(answered.values()), settings), strict=True
        )
    }
    names = {steps: name_of(steps) for steps in results}
    summary = summarize(
        {names[steps]: [result] for steps, result in results.items()},
        seconds=time.perf_counter() - started,
        loss={names[max(results)]: [history]},
    )
    for steps, name in names.items():
        summary["variants"][name]["steps"] = steps
    summary["tamper"] = {
        "model": folder.resolve().name,
        "examples": {kind: len(many) for kind, many in examples.items()},
        **{key: getattr(config, key) for key in TOLD},
    }
    return summary


def run(config: TamperConfig) -> None:
    """Measure, tune and measure again, print the table, and write the report to `output_dir`."""
    report(config, tamper(config), TITLE)
