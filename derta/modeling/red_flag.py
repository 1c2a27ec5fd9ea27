"""A red flag: a special token that is added to a tokenizer and a model, at which answers end.

The tokenizer names it, as it names its end of sequence: the folder of a whole model, of adapters or
of a served model's tokenizer tells it all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from derta.data.tokens.red_flag import NAME, flag_of
from derta.modeling.sharding import class_name

# Noise of a new row, as a share of the root mean square of the others.
NOISE = 0.1


def name_flag(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Add a red flag to a tokenizer, in place, unless it is there; return its id.

    Raises:
        ValueError: the tokenizer has another flag, or the text is another token of it.
    """
    known = getattr(tokenizer, NAME, None)
    if known is not None and known != text:
        raise ValueError(f"red_flag must be {known}, which the tokenizer has already, got {text!r}")
    if known is None:
        if text in tokenizer.get_vocab():
            raise ValueError(
                f"red_flag must be a text that is no token yet, got {text!r}, id "
                f"{tokenizer.convert_tokens_to_ids(text)} of the tokenizer"
            )
        tokenizer.add_tokens([text], special_tokens=True)
        tokenizer._set_model_specific_special_tokens({NAME: text})
    flag = flag_of(tokenizer)
    assert flag is not None
    return flag


def add_flag(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, text: str, seed: int
) -> int:
    """Add a red flag to a tokenizer and a model, in place, unless it is there; return its id.

    Its rows of embeddings and head are the mean of the others, and noise of a tenth of their root
    mean square. They are free rows of a padded vocabulary, or new ones.

    Args:
        model: the model; one under adapters must have the flag, and train its rows.
        tokenizer: its tokenizer.
        text: text of the token.
        seed: seed of the noise.

    Raises:
        ValueError: as `name_flag`; or adapters do not train the flag.
    """
    if isinstance(model, PeftModel):
        known = flag_of(tokenizer)
        if known is None or known not in trained_rows(model.active_peft_config):
            raise ValueError(
                "red_flag must be added before adapters, which train its rows: give add_flag the "
                "model, and its result to adapt as one of tokens"
            )
        return known
    is_new = flag_of(tokenizer) is None
    flag = name_flag(tokenizer, text)
    end_at(model, flag)
    if make_room(model, flag) or is_new:
        generator = torch.Generator().manual_seed(seed)
        for rows in _tables(model):
            others = rows.detach()[:flag]
            size = torch.linalg.vector_norm(others, dtype=_wide(rows)) / math.sqrt(others.numel())
            noise = torch.randn(rows.shape[1:], generator=generator).to(size)
            rows.detach()[flag] = others.mean(0, dtype=_wide(rows)) + NOISE * size * noise
    return flag


def make_room(model: PreTrainedModel, token: int) -> bool:
    """Give a model without adapters rows up to a token, in place; return True if some are new.

    New rows are the mean of the others.
    """
    size = len(next(_tables(model)))
    if token < size:
        return False
    model.resize_token_embeddings(token + 1, mean_resizing=False)
    for rows in map(Tensor.detach, _tables(model)):
        rows[size:] = rows[:size].mean(0, dtype=_wide(rows))
    return True


def end_at(model: PreTrainedModel, flag: int) -> None:
    """Let a model's generations end at a flag, in other programs too."""
    ends = model.generation_config.eos_token_id
    ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None]
    model.generation_config.eos_token_id = [*ends, *({flag} - set(ends))]


def _wide(rows: Tensor) -> torch.dtype:
    """Return the dtype of sums over rows."""
    return torch.promote_types(rows.dtype, torch.float32)


def _tables(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the parameters that have a row for each token: embeddings, the head unless tied."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    yield embeddings.weight
    if head.weight is not embeddings.weight:
        yield head.weight
    if head.bias is not None:
        yield head.bias[:, None]


def rows_of(model: PreTrainedModel, tokens: Iterable[int]) -> dict[str, list[int]]:
    """Return the module whose rows of tokens are trained, as PEFT's `trainable_token_indices`.

    It is the head; where that shares the embeddings, they are, and PEFT trains both as one. A flag
    is written and never read, so embeddings of their own have nothing to learn of it.

    Raises:
        ValueError: the head has a bias, which PEFT's wrapper would drop.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        raise ValueError(
            f"{class_name(model)} has a bias on its head, which PEFT drops where it trains rows of "
            "single tokens: red_flag needs method: full"
        )
    trained = embeddings if head.weight is embeddings.weight else head
    return {name: list(tokens) for name, one in model.named_modules() if one is trained}


def trained_rows(adapters: PeftConfig) -> set[int]:
    """Return the tokens whose rows adapters train."""
    found = getattr(adapters, "trainable_token_indices", None) or {}
    lists = found.values() if isinstance(found, dict) else [found]
    return set().union(*lists)
