"""`derta data validate`: every bad row of record files, in one pass."""

from __future__ import annotations

import re

from derta.cli.settings.data import ValidateConfig
from derta.data import Chat, Reading, Rendered
from derta.data.records.reading import Wanted, read_placed
from derta.data.tokens.special import COMMON, SpecialTokenCount, listed_tokens
from derta.terminal import printable, say


def run(config: ValidateConfig) -> None:
    """Print the place, field and reason of every bad row, and the counts of each file.

    Raises:
        ValueError: a row is bad, the format is unknown, columns name no format's fields, or the
            tokenizer has no usable template.
        FileNotFoundError: a file does not exist.
    """
    reading = Reading()
    special = SpecialTokenCount(_special_tokens(config))
    first = ""
    wanted = Wanted(config.role, config.format, config.columns)
    for place, record in read_placed(config.files, wanted, reading):
        if isinstance(record, ValueError):
            say(printable(str(record)))
        elif not isinstance(record, Rendered):  # those keep their marks
            fields = special.add(record)
            first = first or "".join(f"{place}: {field}" for field in fields[:1])
    for path, counts in reading.files.items():
        say(f"{printable(path)}: {counts}")
    if special.records:
        say(
            f"special tokens in texts: {listed_tokens(special.records, special.tokens)}, first in "
            f"{printable(first)}; see special_tokens_in_text"
        )
    bad = sum(counts.bad for counts in reading.files.values())
    if bad:
        raise ValueError(f"errors: {bad} in {len(reading.files)} files")


def _special_tokens(config: ValidateConfig) -> re.Pattern[str]:
    if config.model is None:
        return COMMON
    from derta.modeling.loading import load_tokenizer

    return Chat(load_tokenizer(config.model, config.chat_template)).special.pattern
