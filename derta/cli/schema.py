"""`derta schema`: the JSON Schema of a training run's configuration."""

from __future__ import annotations

import json
from pathlib import Path

from derta.cli.settings.training import SchemaConfig
from derta.cli.train import TrainConfig
from derta.outputs import write_whole
from derta.settings import json_schema
from derta.terminal import say
from derta.training.ranges import RANGES


def schema_text() -> str:
    """Return the schema. No key is required, since the command line may add it."""
    schema = json_schema(TrainConfig, "Configuration of derta train", whole=False, ranges=RANGES)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def run(config: SchemaConfig) -> None:
    """Print the schema, or write it to `output`.

    Raises:
        OSError: the file cannot be written.
    """
    if config.output is None:
        say(schema_text(), end="")
    else:
        write_whole(Path(config.output), schema_text().encode())
