"""`derta reproduce table4`: the paper's variants trained, attacked and set beside its figures."""

from __future__ import annotations

import gc
from pathlib import Path

from derta.cli import train
from derta.cli.eval import evaluate
from derta.cli.reproduce.data import read_rows, write_rows
from derta.cli.settings.evaluation import EvaluateConfig
from derta.cli.settings.reproduce import Table4Config
from derta.evaluation.presets import official
from derta.evaluation.reporting.paper import table_4
from derta.evaluation.reporting.tables import to_text
from derta.modeling.loading import load_tokenizer
from derta.outputs import compact_json, write_whole
from derta.settings import build, read_yaml
from derta.terminal import say


def train_variants(config: Table4Config) -> dict[str, str]:
    """Train each variant on its file, and return the folders of the models.

    Of the same data and seed, a file is the same again: `resume: auto` continues a variant's run.

    Raises:
        ValueError: closing is not the model's end-of-sequence token.
        ValueError, OSError: as `read_rows` and `derta train`.
    """
    assert config.training is not None
    values = read_yaml(Path(config.training))
    folder = Path(config.output_dir)
    folders = {}
    for recipe, rows in read_rows(config).items():
        path = folder / "data" / f"{recipe}.jsonl"
        folders[recipe] = str(folder / "models" / recipe)
        own = {
            "sources": [{"path": str(path), "role": "safety"}],
            "output_dir": folders[recipe],
            **({} if config.model is None else {"model": config.model}),
        }
        training = build(train.TrainConfig, {config.training: values, "table4": own})
        _check_closing(config.closing, training.model)
        write_rows(rows, path)
        say(f"{recipe}: {len(rows):,} rows")
        gc.collect()  # a trainer refers to itself: the model before would stay on the GPU
        train.run(training)
    return folders


def _check_closing(closing: str, model: str) -> None:
    """Raise a ValueError unless the model ends a text with this token."""
    token = load_tokenizer(model, None).eos_token
    if closing != token:
        raise ValueError(
            f"closing: is {closing!r}, expected {token!r}, the end-of-sequence token of {model}"
        )


def run(config: Table4Config) -> None:
    """Train the variants if no models are given, evaluate them, and print both tables."""
    models = config.models or train_variants(config)
    folder = Path(config.output_dir)
    own = {
        "model": models,
        "output_dir": str(folder / "evaluation"),
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        "device": config.device,
        "dtype": config.dtype,
    }
    if config.chat_template is not None:
        own["chat_template"] = config.chat_template
    preset = official(Path(config.data, "test"))
    settings = build(EvaluateConfig, {"preset official": preset, "table4": own})
    summary = evaluate.evaluate(settings)
    evaluate.report(settings, summary)
    found = table_4(summary["variants"])
    write_whole(folder / "table4.json", compact_json(found.to_dict()).encode())
    say(f"\nattack success, and the paper's (table 4)\n{to_text(found.table())}")
    say("In brackets: 95% intervals. People judged the paper's answers, keywords judge these.")
    say(f"figures: {folder / 'table4.json'}")
