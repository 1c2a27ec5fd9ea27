"""A merged model is the adapted one: embeddings, tied heads and added tokens included."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from derta.cli import main
from derta.data import DertaCollator, EncodedDialogue
from derta.modeling.adapters import adapt
from derta.modeling.loading import check_vocabulary, load_model, load_tuned
from derta.modeling.method import Method
from derta.modeling.patch import apply_derta
from tiny import tiny_model, tiny_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dora": {"lora_dora": True},
    "embeddings": {"lora_target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"lora_modules_to_save": ["embed_tokens"]},
    "head": {"lora_modules_to_save": ["lm_head"]},
    "all": {"lora_target_modules": ["embed_tokens"], "lora_modules_to_save": ["lm_head"]},
}
QUICK = [
    ("llama", "float32", "all"),
    ("qwen2", "float32", "linear"),
    ("qwen2", "float32", "saved"),
    ("qwen2", "bfloat16", "embeddings"),
    ("gemma2", "float32", "embeddings"),
    ("gemma2", "bfloat16", "linear"),
]
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(["llama", "qwen2", "gemma2"], ["float32", "bfloat16"], KINDS)
]
ADDED = ["<|refuse|>", "<|safe|>", "<|stop|>"]


def larger_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(ADDED, special_tokens=True)
    return tokenizer


def trained(folder: Path, base: PreTrainedModel, **keys: Any) -> None:
    """Write `base`, and adapters on it that differ from it as trained ones do."""
    base.save_pretrained(folder / "base")
    larger_tokenizer().save_pretrained(folder / "base")
    model = load_model(str(folder / "base"), base.dtype)
    adapted = adapt(model, Method(method="lora", lora_r=4, lora_alpha=8, **keys))
    generator = torch.Generator().manual_seed(0)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator).to(weight)
    adapted.save_pretrained(folder / "adapters")


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.arange(403).view(13, 31)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


@pytest.mark.parametrize(("architecture", "dtype", "kind"), CASES)
def test_a_merged_model_has_the_adapted_ones_logits(
    tmp_path: Path, architecture: str, dtype: str, kind: str
) -> None:
    """In a vocabulary with added tokens; the head is tied but for Llama's."""
    precision = getattr(torch, dtype)
    base = tiny_model(architecture, dtype=precision)
    base.resize_token_embeddings(403)
    trained(tmp_path, base, **KINDS[kind])
    adapted, _ = load_tuned(tmp_path / "adapters", precision, None)
    theirs = logits(adapted)
    exact = logits(adapted.double())
    given = ["--output_dir", str(tmp_path / "merged"), "--dtype", dtype]
    assert main(["merge", str(tmp_path / "adapters"), *given]) == 0

    merged = load_model(str(tmp_path / "merged"), precision)
    band = torch.finfo(precision).eps * exact.abs().max()
    assert (logits(merged) - exact).abs().max() <= 2 * ((theirs - exact).abs().max() + band)
    assert (logits(base) - exact).abs().max() > 10 * band
    assert merged.get_input_embeddings().weight.shape[0] == 403
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    still_tied = architecture != "llama" and kind in ("linear", "dora")
    assert config["tie_word_embeddings"] == still_tied


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_trained_through_the_adapted_models_own_head(tmp_path: Path, kind: str) -> None:
    trained(tmp_path, tiny_model("qwen2", dtype=torch.float64), **KINDS[kind])
    adapted, _ = load_tuned(tmp_path / "adapters", torch.float64, None)
    ids, is_target = np.arange(40, 60, dtype=np.int32), np.arange(20) > 4
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor(ids)[None].long()).logits[0, :-1]
    targets = torch.tensor(np.where(is_target, ids, -100)[1:]).long()
    apply_derta(adapted, 5)
    batch = DertaCollator()([EncodedDialogue(id="d", input_ids=ids, is_target=is_target)])
    loss = adapted(**batch.model_inputs()).loss
    assert loss.item() == pytest.approx(cross_entropy(expected, targets).item(), rel=1e-12)


def test_a_tokenizer_larger_than_the_head_is_named_as_that() -> None:
    tokenizer, model = larger_tokenizer(), tiny_model("llama")
    tokenizer.chat_template += "{# <|refuse|> #}"
    message = (
        r"^base: the tokenizer is larger than the model's head: it gives '<\|refuse\|>' the id 400,"
        " expected ids below 400, the model's vocab_size: use .* own tokenizer, or resize .* first$"
    )
    with pytest.raises(ValueError, match=message):
        check_vocabulary(tokenizer, model.config, "base")
    model.resize_token_embeddings(403)
    check_vocabulary(tokenizer, model.config, "base")


def test_adapters_of_a_resized_model_do_not_fit_its_base(tmp_path: Path) -> None:
    trained(tmp_path, tiny_model("llama"))
    model = load_model(str(tmp_path / "base"), torch.float32)
    model.resize_token_embeddings(403)
    adapt(model, Method(method="lora", lora_r=4)).save_pretrained(tmp_path / "resized")
    message = r"resized.*embed_tokens.weight has shape \(403, 32\), expected \(400, 32\)[^\n]*$"
    with pytest.raises(ValueError, match=message):
        load_tuned(tmp_path / "resized", torch.float32, None)
