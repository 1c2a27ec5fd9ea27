"""Records what the authors' code makes of invented texts: `python -m official.record FOLDER`.

FOLDER is a checkout of their repository. Their code is run, not copied: the generator as it is, the
tokenization and the loss as the parts of their scripts that do it, since the scripts as a whole
need transformers 4.40. Their functions get our tiny tokenizer and a tiny Llama in float64.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from official.files import DIALOGUES, TRAIN_FILES, TRIPLES, write_files

HERE = Path(__file__).parent
RECORDING = HERE / "recording.json"
TOKENIZER = HERE / "tokenizer.json"
SEED = 5
BLOCK_SIZE = 48
MICRO_BATCH = 4
SCRIPTS = {
    "full": "run_files/run_clm_llms_derta_llama_drop_5_percent.py",
    "lora": "run_files/run_clm_lora_derta_llama.py",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the recorded tokenizer, which begins every text with a token, as Llama 3's does."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="[PAD]",
    )


class Norm(torch.nn.Module):
    """The norm of a Llama, which transformers computes in float32, in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Rotary(torch.nn.Module):
    """The rotary embedding of a head of width 8, likewise."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        turns = 10.0 ** -torch.arange(4, dtype=torch.float64)
        angles = (position_ids[..., None] * turns).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def model() -> LlamaForCausalLM:
    """Return a tiny Llama in float64 whose weights are a formula, the same everywhere."""
    config = LlamaConfig(
        vocab_size=19_712,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    made = LlamaForCausalLM(config)
    made.model.rotary_emb, made.model.norm = Rotary(), Norm(16)
    for layer in made.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = Norm(16), Norm(16)
    made.double()
    with torch.no_grad():
        for place, weight in enumerate(made.parameters()):
            at = torch.arange(weight.numel(), dtype=torch.float64)
            weight.copy_((0.3 * torch.sin(0.7 * at * (1 + place / 9) + place)).view_as(weight))
    return made


def train_tokenizer() -> None:
    """Write the tokenizer of the invented texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in TRIPLES + DIALOGUES for text in row.values()]
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made.save(str(TOKENIZER), pretty=False)


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def generated(repository: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows that their generator writes."""
    code = (repository / "data/train/generate_training_data.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        write_files(Path(), TRAIN_FILES)
        random.seed(SEED)
        exec(compile(code, "generate_training_data.py", "exec"), {})
        names = ("llama_vanilla", "llama_recaug", "llama_derta")
        return {
            name: [json.loads(line) for line in Path(f"{name}.json").read_text().splitlines()]
            for name in names
        }


def preprocessing(source: ast.AST) -> Callable[[Mapping[str, list[str]]], Any]:
    """Return the function of their script that tokenizes rows."""
    nodes = [one for one in ast.walk(source) if getattr(one, "name", "") == "preprocess_function"]
    names: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "block_size": BLOCK_SIZE,
        "column_names": ["text", "prefix", "safe"],
        "text_column_name": "text",
        "IGNORE_INDEX": -100,
        "copy": copy,
        "tok_logger": None,
        "CaptureLogger": lambda logger: contextlib.nullcontext(SimpleNamespace(out="")),
    }
    exec(ast.unparse(nodes[-1]), names)
    return names["preprocess_function"]


def loss_of(source: ast.AST) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the part of their model's forward that masks the labels and takes the loss."""
    (forward,) = (one for one in ast.walk(source) if getattr(one, "name", "") == "forward")
    (block,) = (
        one
        for one in ast.walk(forward)
        if isinstance(one, ast.If) and ast.unparse(one.test) == "labels is not None"
    )
    code = ast.unparse(ast.Module(block.body, []))

    def run(logits: torch.Tensor, labels: torch.Tensor, safe: torch.Tensor) -> Any:
        config = SimpleNamespace(vocab_size=logits.shape[-1])
        names = {
            "logits": logits,
            "labels": labels,
            "binary_safe": safe,
            "self": SimpleNamespace(config=config),
            "copy": copy,
            "torch": torch,
            "CrossEntropyLoss": torch.nn.CrossEntropyLoss,
        }
        exec(code, names)
        return names["loss"], names["safe_labels"]

    return run


def step(source: ast.AST, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Return the tokens, masked labels, losses and gradients of one optimizer step."""
    columns = {name: [row[name] for row in rows] for name in ("text", "prefix", "safe")}
    encoded = preprocessing(source)(columns)
    encoded = {name: encoded[name] for name in ("input_ids", "labels", "safe_labels")}
    collate = DataCollatorForSeq2Seq(
        tokenizer(),
        pad_to_multiple_of=8,
        return_tensors="pt",
        padding=True,
        label_pad_token_id=-100,
    )
    tuned, take_loss = model(), loss_of(source)
    torch.manual_seed(SEED)
    masked, losses = [], []
    for first in range(0, len(rows), MICRO_BATCH):
        batch = collate(
            [
                {name: values[row] for name, values in encoded.items()}
                for row in range(first, first + MICRO_BATCH)
            ]
        )
        logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, labels = take_loss(logits, batch["labels"], batch["safe_labels"].flatten())
        (loss / (len(rows) // MICRO_BATCH)).backward()
        masked.append(labels.tolist())
        losses.append(loss.item())
    gradients = {name: weight.grad.norm().item() for name, weight in tuned.named_parameters()}
    return {**encoded, "masked": masked, "losses": losses, "gradients": gradients}


def main(repository: Path) -> None:
    train_tokenizer()
    files = generated(repository)
    by_kind = files["llama_derta"]
    # Every micro-batch has helpful, RTO and prefix rows; the long ones are truncated.
    helpful, rto, safe = by_kind[:6], by_kind[6:15], by_kind[15:]
    rows = [helpful[2], rto[3], safe[1], rto[1], helpful[0], rto[7], safe[0], safe[2]]
    rows += [rto[5], helpful[3], safe[5], rto[2]]
    found: dict[str, Any] = {"files": files, "rows": rows}
    for name, path in SCRIPTS.items():
        source = ast.parse((repository / path).read_text(encoding="utf-8"))
        found[name] = step(source, rows)
    RECORDING.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
