"""Faults of models in one sentence: what a library raises, and weights that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from derta.modeling.folders import listed
from derta.modeling.offloading import ran_out_of_memory

# What libraries append to an error.
GUESSES = re.compile(r"\.? (This could be because|This might be caused by) .*")
# What they raise where a file is JSON, but its values are of another type or size.
MISREAD = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@contextmanager
def loading(what: str, folder: str) -> Iterator[None]:
    """Turn an error inside into one sentence that names the model and the missing part.

    Args:
        what: the part to load: the model, its tokenizer.
        folder: path of the model, or its name on the model hub.

    Raises:
        OSError, ValueError: the part cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        said = GUESSES.sub("", said)
        if isinstance(error.__cause__, HFValidationError):
            said = "no such folder"
        elif not Path(folder).is_dir():
            said = f"is not a folder, and neither the model hub nor its local cache has it: {said}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder}: {what} cannot be loaded: {said}") from error
    except Exception as error:
        # `tokenizers` raises the class itself for a tokenizer.json that it cannot read.
        if type(error) is not Exception and not isinstance(error, MISREAD):
            raise
        if isinstance(error, RuntimeError) and ran_out_of_memory(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: {what} cannot be loaded: {said}") from error


@contextmanager
def intact_weights(folder: str | Path) -> Iterator[None]:
    """Name the folder if its weights, read inside, are damaged.

    Raises:
        ValueError: a safetensors file is damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged or incomplete: {error}") from error


def refuse_misfits(found: Mapping[str, Any], what: str, expected: str) -> None:
    """Refuse weights that are not those of the model, which libraries would draw at random.

    Args:
        found: `missing_keys`, `unexpected_keys` and `mismatched_keys` (name, shape of the file,
            shape of the model), as of `output_loading_info` in transformers.
        what: folder and weights, in the words of the sentence.
        expected: the files that they should fit.

    Raises:
        ValueError: names the first tensors.
    """
    missing, unexpected = (_sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    others = [
        f"{name} has shape {tuple(has)}, expected {tuple(shape)}"
        for name, has, shape in sorted(found["mismatched_keys"], key=lambda one: str(one[0]))
    ]
    faults = [f"{listed(missing)} missing"] if missing else []
    faults += [f"{listed(unexpected)} unexpected"] if unexpected else []
    faults += [listed(others)] if others else []
    if faults:
        raise ValueError(
            f"{what} not fit {expected}: {'; '.join(faults)}: use all files of one model"
        )


def _sorted(names: Iterable[str]) -> list[str]:
    """Return names in the order of their numbers: layer 2 before layer 10."""
    return sorted(names, key=lambda name: [part.zfill(8) for part in name.split(".")])
