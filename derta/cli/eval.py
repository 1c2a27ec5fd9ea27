"""`derta eval`: attack success, over-refusal and refusal curves of models in local folders."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers.trainer import TRAINER_STATE_NAME

from derta.cli.loading import (
    find_device,
    load_tuned,
    read_files,
    weights_dtype,
)
from derta.config import check_folder
from derta.data import Dialogue, Triple
from derta.evaluation import (
    EvaluationData,
    EvaluationSettings,
    KeywordJudge,
    VariantResult,
    evaluate_model,
    format_table,
    summarize,
    write_report,
)
from derta.evaluation.judge import REFUSAL_KEYWORDS

Kind = TypeVar("Kind", Triple, Dialogue)


@dataclass(kw_only=True)
class Config:
    """An evaluation.

    Args:
        model: folder of a model or of PEFT adapters, with weights in safetensors; or several, as a
            list of folders or as a mapping of names to folders.
        output_dir: where report.html, summary.json and the pictures go.
        harmful: file of triples: requests to refuse, and the responses that attacks prefill.
        benign: file of dialogues whose requests are harmless, for over-refusal.
        helpful: file of dialogues whose last answers are the right ones.
        refusal: the refusal token, as in training: a word, a token id, or "auto".
        prefill_depths: how many tokens of the harmful response an attacker writes.
        max_new_tokens: longest answer.
        batch_size: prompts a batch.
        max_tokens: tokens a pack of the refusal curve.
        curve: whether to read refusal curves, which need a model that `apply_derta` takes.
        helpful_metric: "exact_match" of generated answers, or "perplexity" of the given ones.
        keywords: what the judge takes for a refusal.
        samples: answers shown in the report for each scenario.
        chat_template: Jinja text, or a file that holds it, for a tokenizer that has none.
        device: "auto", or as in torch: "cpu", "cuda:1".
        dtype: of the weights; "auto" is bfloat16 where a GPU computes in it, float32 elsewhere.

    Raises:
        ValueError: there is nothing to evaluate on, or `output_dir` can be no folder.
    """

    model: str | list[str] | dict[str, str]
    output_dir: str
    harmful: str | None = None
    benign: str | None = None
    helpful: str | None = None
    refusal: str | int = "auto"
    prefill_depths: list[int] = field(default_factory=lambda: [0, 4, 8, 16, 32, 64])
    max_new_tokens: int = 256
    batch_size: int = 16
    max_tokens: int = 4096
    curve: bool = True
    helpful_metric: Literal["exact_match", "perplexity"] = "exact_match"
    keywords: list[str] = field(default_factory=lambda: list(REFUSAL_KEYWORDS))
    samples: int = 0
    chat_template: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.harmful is None and self.benign is None and self.helpful is None:
            raise ValueError("name at least one file of records: harmful, benign or helpful")
        check_folder("output_dir", self.output_dir)


def model_folders(model: str | list[str] | dict[str, str]) -> dict[str, Path]:
    """Folders by the names they have in the report.

    Raises:
        ValueError: two folders have one name, or none is given.
        FileNotFoundError: a folder is not there.
    """
    if isinstance(model, dict):
        folders = {name: Path(path) for name, path in model.items()}
    else:
        paths = [Path(path) for path in ([model] if isinstance(model, str) else model)]
        folders = {path.resolve().name: path for path in paths}
        if len(folders) < len(paths):
            raise ValueError(
                "model: two folders have one name; name them: --model '{before: a/model, after: "
                "b/model}'"
            )
    if not folders:
        raise ValueError("model: expected at least one folder, got none")
    for path in folders.values():
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such model folder")
    return folders


def read_kind(key: str, path: str | None, kind: type[Kind]) -> list[Kind]:
    """Records of one kind.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a record is of another kind.
    """
    if path is None:
        return []
    records = []
    for record in read_files([path]):
        if not isinstance(record, kind):
            raise ValueError(
                f"{path}: {key} takes a file of {kind.__name__.lower()}s, {record.id} is a "
                f"{type(record).__name__.lower()}"
            )
        records.append(record)
    return records


def loss_history(folder: Path) -> Sequence[Mapping[str, Any]]:
    """What was logged while this very model was trained, if `derta train` left it in its folder.

    Checkpoints beside it may be another run's.
    """
    state = folder / TRAINER_STATE_NAME
    return json.loads(state.read_text("utf-8"))["log_history"] if state.is_file() else []


def run(config: Config) -> None:
    """Evaluates every model, prints the table, and leaves the report in `output_dir`."""
    started = time.perf_counter()
    folders = model_folders(config.model)
    device = find_device(config.device)
    data = EvaluationData(
        harmful=read_kind("harmful", config.harmful, Triple),
        benign=read_kind("benign", config.benign, Dialogue),
        helpful=read_kind("helpful", config.helpful, Dialogue),
    )
    settings = EvaluationSettings(
        refusal=config.refusal,
        prefill_depths=config.prefill_depths,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        curve=config.curve,
        helpful=config.helpful_metric,
        judge=KeywordJudge(config.keywords),
        samples=config.samples,
    )
    results: dict[str, list[VariantResult]] = {}
    for name, folder in folders.items():
        model: Any
        dtype = weights_dtype(config.dtype, device)
        model, tokenizer = load_tuned(folder, dtype, config.chat_template)
        model.to(device)
        results[name] = [evaluate_model(model, tokenizer, data, settings)]
        del model
    summary = summarize(
        results,
        seconds=time.perf_counter() - started,
        loss={
            name: [history] for name, folder in folders.items() if (history := loss_history(folder))
        },
    )
    report = write_report(summary, config.output_dir)
    print(f"{format_table(summary)}\n\nreport: {report}")
