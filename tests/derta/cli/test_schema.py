"""The JSON Schema of a training run's configuration: committed, and as strict as the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from derta.cli import main
from derta.settings import read_yaml

EXAMPLES = Path(__file__).parents[3] / "examples"
SCHEMA = EXAMPLES / "derta.schema.json"
SOURCE = {"path": "a.jsonl", "role": "safety"}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_committed_schema_is_the_printed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert printed == SCHEMA.read_text(encoding="utf-8"), "run: derta schema --output " + str(
        SCHEMA
    )
    output = tmp_path / "derta.schema.json"
    assert main(["schema", "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_names_the_schema_and_satisfies_it(path: Path, validator: Any) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA.name}"
    assert list(validator.iter_errors(read_yaml(path))) == []


@pytest.mark.parametrize(
    "values",
    [
        {"refusal": 5, "rto_keep": 1, "sources": SOURCE},
        {"sources": [{**SOURCE, "path": ["a", "b"], "weight": 0.5}]},
        {"save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 0.03},
        {"recipe": None, "mlp_tile": None, "early_stopping_patience": 3},
        {"lora_target_modules": ["q_proj"], "report_to": "wandb", "label_names": "a"},
        {"resume_from_checkpoint": True, "liger_kernel_config": {"rope": False}},
    ],
)
def test_right_values_are_accepted(values: dict, validator: Any) -> None:
    assert list(validator.iter_errors(values)) == []


@pytest.mark.parametrize(
    "values",
    [
        {"learnign_rate": 1e-5},
        {"branches": "two"},
        {"branches": True},
        {"branches": -1},
        {"rto_keep": 1.5},
        {"lora_dropout": 1},
        {"unlikelihood_weight": -0.1},
        {"cuts": "random"},
        {"recipe": "sorry"},
        {"dtype": "float16"},
        {"refusal": True},
        {"lr_scheduler_type": "coisne"},
        {"label_names": 5},
        {"max_tokens": 0},
        {"mlp_tile": 0},
        {"gradient_checkpointing": "yes"},
        {"sources": "a.jsonl"},
        {"sources": [{"path": "a.jsonl"}]},
        {"sources": [{**SOURCE, "role": "harmful"}]},
        {"sources": [{**SOURCE, "weigth": 1}]},
        {"sources": [{**SOURCE, "weight": 0}]},
        {"eval_sources": [{**SOURCE, "limit": 0}]},
    ],
)
def test_wrong_keys_and_values_are_refused(values: dict, validator: Any) -> None:
    assert list(validator.iter_errors(values))


def test_our_keys_have_description_default_choices_and_range(validator: Any) -> None:
    keys = validator.schema["properties"]
    assert keys["rto_depth"]["enum"] == ["uniform", "growing"]
    assert keys["rto_depth"]["default"] == "uniform"
    assert keys["rto_depth"]["description"].startswith("Spread of that weight")
    lora_dropout = {name: keys["lora_dropout"][name] for name in ("minimum", "exclusiveMaximum")}
    assert lora_dropout == {"minimum": 0, "exclusiveMaximum": 1}
    assert keys["weight_decay"]["type"] == "number"
    assert (keys["weight_decay"]["minimum"], keys["adam_beta1"]["exclusiveMaximum"]) == (0, 1)
